"""Links of Markdown pages, and where they lead on the site.

A page of docs/ keeps its place. Whatever else in the repository is linked, from there or from a page so reached, is
shown on the site under `repository/`: Markdown as a page, source as a page that shows it, a folder as a list, a picture
as it is. So links out of docs/ work on the site as they do where the repository is looked at, and the site leads to no
other host.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
DOCS = "docs"
ELSEWHERE = "repository"
MADE = {
    f"{DOCS}/reference/index.md#settings": "reference/settings.md",
    f"{DOCS}/reference/index.md#command-line": "reference/commands.md",
    f"{DOCS}/reference/index.md#python": "reference/api/index.md",
}
"""Sections that stand for pages which are made of the code, and which the repository does not hold."""
_NO_SEARCH = "---\nsearch:\n  exclude: true\n---\n"
_PICTURES = {".gif", ".jpg", ".jpeg", ".png", ".svg"}
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".json": "json", ".toml": "toml"}
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[ \t]*$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
_LINK = re.compile(r"(?P<before>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?P<target>[^)\s]+)(?P<after>(?:\s+\"[^\"]*\")?\))")
_ELSEWHERE_SCHEMES = re.compile(r"[a-z][a-z0-9+.-]*:", re.I)


def links_of(text: str) -> Iterator[re.Match[str]]:
    """Inline links and pictures, in order; what stands in code is none."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    spans = [match.span() for match in _SPAN.finditer(text) if not _within(match.start(), fences)]
    for match in _LINK.finditer(text):
        if not _within(match.start(), fences) and not _within(match.start(), spans):
            yield match


def _within(place: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start <= place < end for start, end in spans)


def path_of(page: str, target: str) -> tuple[str, str] | None:
    """Of a link on the page `page` (both below the repository's root): path and anchor ("#…" or nothing).

    None for an address of another host. Raises ValueError for a path that leaves the repository.
    """
    if _ELSEWHERE_SCHEMES.match(target) or target.startswith("//"):
        return None
    path, mark, anchor = target.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if found.startswith(("..", "/")):
        raise ValueError(f"{page}: {target} leaves the repository")
    return found, mark + anchor


def shown_at(path: str) -> str:
    """Where the site has its source of `path`."""
    if PurePosixPath(path).parts[0] == DOCS and path != DOCS:
        return posixpath.relpath(path, DOCS)
    if (ROOT / path).is_dir():
        return f"{ELSEWHERE}/{path}/folder.md" if path != "." else f"{ELSEWHERE}/folder.md"
    suffix = PurePosixPath(path).suffix
    return f"{ELSEWHERE}/{path}" if suffix in _PICTURES or suffix == ".md" else f"{ELSEWHERE}/{path}.md"


def rewritten(text: str, page: str) -> str:
    """The page `page` (below the repository's root) with links that are right on the site."""

    def replace(match: re.Match[str]) -> str:
        found = path_of(page, match["target"])
        if found is None:
            return match[0]
        path, anchor = found
        made = MADE.get(path + anchor)
        if made is None and path == page:
            return match[0]
        link = posixpath.relpath(made or shown_at(path), posixpath.dirname(shown_at(page)) or ".")
        anchor = "" if made else anchor
        return match["before"] + link + anchor + match["after"]

    return _replaced(text, replace)


def _replaced(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    parts, done = [], 0
    for match in links_of(text):
        parts += [text[done : match.start()], replace(match)]
        done = match.end()
    return "".join([*parts, text[done:]])


def reached(pages: Iterable[str]) -> list[str]:
    """All paths outside of docs/ that these pages link, and that pages so reached link."""
    left, found = list(pages), set[str]()
    while left:
        page = left.pop()
        for match in links_of((ROOT / page).read_text(encoding="utf-8")):
            target = path_of(page, match["target"])
            if target is None or (path := target[0]) in found or PurePosixPath(path).parts[:1] == (DOCS,):
                continue
            if (ROOT / path).exists():  # what is missing is left to mkdocs, which says so
                found.add(path)
                left += [path] if path.endswith(".md") else []
    return sorted(found)


def shown(path: str) -> str | bytes:
    """The site's source of a path outside of docs/."""
    place = ROOT / path
    if place.is_dir():
        return _folder(place, path)
    if place.suffix in _PICTURES:
        return place.read_bytes()
    text = place.read_text(encoding="utf-8")
    if place.suffix == ".md":
        return text
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{_NO_SEARCH}# {path}\n\n{fence}{_LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _folder(place: Path, path: str) -> str:
    """Its files, with the first line of what they say of themselves."""
    rows = []
    for file in sorted(place.iterdir(), key=lambda each: (each.is_dir(), each.name)):
        if file.name.startswith((".", "__pycache__")):
            continue
        says = ""
        module = file / "__init__.py" if file.is_dir() else file
        if module.suffix == ".py" and module.is_file():
            says = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        rows.append(f"| `{file.name}{'/' if file.is_dir() else ''}` | {says.replace('|', chr(92) + '|')} |")
    head = f"{_NO_SEARCH}# {path}/\n\nThis folder of the repository holds:\n\n| | |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"
