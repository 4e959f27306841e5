"""The site as a browser shows it: pages, search, dark mode, no error and no other host."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run",
         "--disable-component-update"]  # fmt: skip
PAGES = {
    "": "Where to begin",
    "tutorial/": "Find wrong labels",
    "architecture/": "Collectives of a step",
    "reference/settings/": "clustering.noise_gap",
    "reference/commands/": "python -m data pack folder",
    "reference/api/partial_fc/": "CentreSGD",
}
"""Page to what is read on it."""
_WAIT_MS = 30_000

pytestmark = [
    pytest.mark.skipif("CLUSTERFACE_TEST_DOCS" not in os.environ, reason="`make test-docs` runs it"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt-get install chromium"),
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """A browser's page, which keeps what went wrong and what was asked of other hosts in `faults`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright (the extra `dev` has it)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        opened = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme="light")
        opened.faults = []
        opened.on("console", lambda said: opened.faults.append(said.text) if said.type == "error" else None)
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.on("requestfailed", lambda asked: opened.faults.append(f"failed: {asked.url}"))
        opened.on(
            "request",
            lambda asked: (
                None if asked.url.startswith((address, "data:", "blob:")) else opened.faults.append(asked.url)
            ),
        )
        yield opened
        browser.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_shown(page: Any, address: str, tmp_path: Path, path: str) -> None:
    page.goto(address + path)
    page.get_by_text(PAGES[path]).first.wait_for(state="attached", timeout=_WAIT_MS)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=_kept(tmp_path, f"{path.strip('/').replace('/', '-') or 'index'}.png"))
    broken = "images => images.filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
    assert page.locator("img").evaluate_all(broken) == []
    assert page.faults == []


def test_the_diagram_of_the_architecture_is_drawn_in_either_mode(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(f"{address}architecture/")
    for seen, hidden in (("light", "dark"), ("dark", "light")):
        page.locator(f"img[src$='#only-{seen}']").first.wait_for(state="visible", timeout=_WAIT_MS)
        assert not page.locator(f"img[src$='#only-{hidden}']").first.is_visible()
        shot = _kept(tmp_path, f"architecture-{seen}.png")
        page.screenshot(path=shot)
        with Image.open(shot) as picture:
            brightness = np.asarray(picture.convert("L")).mean()
        assert (brightness > 128) == (seen == "light")
        page.locator("form[data-md-component=palette] label:visible").click()  # the other mode
    assert page.faults == []


def test_search_finds_settings_commands_and_classes(page: Any, address: str, tmp_path: Path) -> None:
    for query, expected in (
        ("noise_gap", "reference/settings"),
        ("int8", "export"),
        ("CentreAdamW", "reference/api/partial_fc"),
    ):
        page.goto(address)
        box = page.locator("input.md-search__input")
        box.click()
        box.type(query)
        page.locator(".md-search-result__item").first.wait_for(state="visible", timeout=_WAIT_MS)
        page.screenshot(path=_kept(tmp_path, f"search-{query}.png"))
        found = page.locator(f".md-search-result__item a[href*='{expected}']")
        found.first.wait_for(state="visible", timeout=_WAIT_MS)
    assert page.faults == []


def _kept(folder: Path, name: str) -> Path:
    """Where a screenshot goes: a folder that is named to look at it, or nowhere that lasts."""
    kept = Path(os.environ.get("CLUSTERFACE_SCREENSHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    return kept / name
