"""Diagrams of docs/: Mermaid's text in the pages, which GitHub draws itself, and pictures of it for the site.

`python -m scripts.docs.diagrams` draws what is not drawn yet into docs/images/diagrams/, named by a hash of the text,
and removes what no page has any more. It needs npm, which fetches Mermaid, and Chromium. Building the site needs
neither.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.docs.links import DOCS, ROOT

_FOLDER = "images/diagrams"
_MERMAID = "mermaid@12.3.0"
_FENCE = re.compile(r"^```mermaid\n(.*?)^```[ \t]*$", re.M | re.S)
_THEMES = {"light": "neutral", "dark": "dark"}
"""What the site's appearance is called, and Mermaid's theme."""


def name_of(diagram: str) -> str:
    """Of its pictures."""
    return hashlib.sha256(diagram.encode()).hexdigest()[:12]


def replaced(text: str, page: str) -> tuple[str, list[str]]:
    """The page with pictures in place of diagrams, and the names of diagrams that are not drawn, which stay text."""
    missing = []
    folder = posixpath.relpath(f"{DOCS}/{_FOLDER}", posixpath.dirname(f"{DOCS}/{page}"))

    def replace(match: re.Match[str]) -> str:
        name = name_of(match[1])
        if not all(_file(name, theme).is_file() for theme in _THEMES):
            missing.append(name)
            return match[0].replace("```mermaid", "```text", 1)
        headings = re.findall(r"^#+ +(.+)$", text[: match.start()], re.M) or [page]
        return "\n".join(f"![Diagram: {headings[-1]}]({folder}/{name}-{theme}.svg#only-{theme})" for theme in _THEMES)

    return _FENCE.sub(replace, text), missing


def diagrams() -> Iterator[str]:
    """Of all pages of docs/."""
    for page in sorted((ROOT / DOCS).rglob("*.md")):
        for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
            yield match[1]


def _file(name: str, theme: str) -> Path:
    return ROOT / DOCS / _FOLDER / f"{name}-{theme}.svg"


def _script(folder: Path) -> str:
    """Mermaid as one script."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("error: expected npm, which fetches Mermaid: apt-get install npm")
    subprocess.run([npm, "pack", "--silent", _MERMAID], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("mermaid-*.tgz"))) as archive:
        found = archive.extractfile("package/dist/mermaid.min.js")
        assert found is not None
        return found.read().decode()


def main() -> int:
    """Draw. Returns 0."""
    wanted = {name_of(text): text for text in diagrams()}
    (ROOT / DOCS / _FOLDER).mkdir(parents=True, exist_ok=True)
    for file in (ROOT / DOCS / _FOLDER).glob("*.svg"):
        if file.stem.rpartition("-")[0] not in wanted:
            file.unlink()
            print(f"{file.name}: removed")
    left = [(name, theme) for name in wanted for theme in _THEMES if not _file(name, theme).is_file()]
    if not left:
        return 0
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only this command needs it

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_content("<body></body>")
        page.add_script_tag(content=_script(Path(folder)))
        for name, theme in left:
            drawn = page.evaluate(
                """async ([name, text, theme]) => {
                    mermaid.initialize({startOnLoad: false, theme, htmlLabels: false, deterministicIds: true,
                                        flowchart: {htmlLabels: false, wrappingWidth: 320}, fontFamily: "sans-serif"});
                    return (await mermaid.render("d" + name, text)).svg;
                }""",
                [name, wanted[name], _THEMES[theme]],
            )
            _file(name, theme).write_text(drawn + "\n", encoding="utf-8")
            print(f"{_file(name, theme).relative_to(ROOT)}: {len(drawn)} bytes")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
