"""The site: built without a warning, whole, and without another host."""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
from pymdownx.slugs import slugify

from scripts.docs import links, public
from scripts.docs.settings import all_settings
from tests.docs.blocks import ROOT

REPOSITORY_PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
)
_LOADING = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Found(NamedTuple):
    """Of a page of the site."""

    anchors: set[str]
    links: list[str]
    loaded: list[str]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = Found(set(), [], [])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.found.anchors.add(value)
            elif tag == "a" and name == "href":
                self.found.links.append(value)
            elif (tag, name) in _LOADING and not value.startswith("data:"):
                self.found.loaded.append(value)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Found]:
    """Path below the site to what is in it."""
    read = {}
    for file in sorted(site.rglob("*.html")):
        reader = _Reader()
        reader.feed(file.read_text(encoding="utf-8"))
        read[file.relative_to(site).as_posix()] = reader.found
    return read


def test_the_site_is_built_without_a_warning(built: tuple[Path, list[str]]) -> None:
    assert built[1] == []


def test_the_site_has_its_pages(pages: dict[str, Found]) -> None:
    expected = {f"{path.removeprefix('docs/').removesuffix('.md')}/index.html" for path in REPOSITORY_PAGES
                if path.startswith("docs/") and path != "docs/index.md"}  # fmt: skip
    expected |= {f"reference/api/{group}/index.html" for group in public.PUBLIC}
    expected |= {"index.html", "reference/settings/index.html", "reference/commands/index.html"}
    assert expected <= set(pages)


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path, pages: dict[str, Found]) -> None:
    broken = []
    for page, found in pages.items():
        if page == "404.html":  # its links begin at the root of whatever host serves it
            continue
        for link in [*found.links, *found.loaded]:
            if re.match(r"(https?|mailto):", link):
                continue
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            if (site / target).is_dir():
                target = posixpath.normpath(f"{target}/index.html")
            known = pages[target].anchors if target in pages else set[str]()
            if not (site / target).is_file() or (anchor and target in pages and anchor not in known):
                broken.append(f"{page}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[str, Found]) -> None:
    for page, found in pages.items():
        assert not [link for link in found.loaded if re.match(r"(https?:)?//", link)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_diagrams_are_pictures(site: Path) -> None:
    text = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"images/diagrams/[0-9a-f]{12}-light\.svg#only-light", text)
    assert "flowchart LR" not in text


def test_every_setting_has_an_anchor(pages: dict[str, Found]) -> None:
    assert {setting.name for setting in all_settings()} <= pages["reference/settings/index.html"].anchors


def test_every_setting_says_what_it_is() -> None:
    plain = {"optim.name", "optim.weight_decay", "train.epochs", "train.seed", "eval.batch_size"}
    with_the_one_before = {"head.length_high", "head.margin_low", "head.margin_high"}
    assert {setting.name for setting in all_settings() if not setting.text} <= plain | with_the_one_before


@pytest.mark.parametrize("group", public.PUBLIC)
def test_every_public_module_is_on_its_page(pages: dict[str, Found], group: str) -> None:
    assert set(public.PUBLIC[group]) <= pages[f"reference/api/{group}/index.html"].anchors


@pytest.mark.parametrize("page", REPOSITORY_PAGES)
def test_links_of_the_repository_s_pages_lead_somewhere(page: str) -> None:
    """As they are read where the repository is looked at: files, and anchors of headings."""
    for match in links.links_of((ROOT / page).read_text(encoding="utf-8")):
        found = links.path_of(page, match["target"])
        if found is None:
            continue
        path, anchor = found
        assert (ROOT / path).exists(), match[0]
        if anchor and path.endswith(".md"):
            assert anchor[1:] in _anchors(path), match[0]


def _anchors(page: str) -> set[str]:
    text = re.sub(r"^(`{3,}).*?^\1", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    slug = slugify(case="lower")
    return {slug(re.sub(r"[`*]", "", found[1]), "-") for found in re.finditer(r"^#+ +(.*?)\s*$", text, re.M)}
