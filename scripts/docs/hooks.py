"""mkdocs' hooks: pages that are made of the code, links that leave docs/, diagrams. Named in mkdocs.yml."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.docs import commands, diagrams, links, public, settings

_log = logging.getLogger("mkdocs.hooks.clusterface")
_SHOWN_ANYWAY = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "README.md", "benchmarks/README.md")
"""Also where no page links them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what docs/ does not hold."""
    made: dict[str, str | bytes] = {
        "reference/settings.md": settings.page(),
        "reference/commands.md": commands.page(),
        **public.pages(),
    }
    written = [f"{links.DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    for path in sorted({*links.reached([*written, *_SHOWN_ANYWAY]), *_SHOWN_ANYWAY}):
        made[links.shown_at(path)] = links.shown(path)
    for place, content in made.items():
        if (old := files.get_file_from_path(place)) is not None:
            raise ValueError(f"docs/{old.src_uri}: this page is made of the code, and cannot stand in docs/ too")
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links round, and shows diagrams as pictures."""
    place = page.file.src_uri
    path = f"{links.DOCS}/{place}"
    if PurePosixPath(place).parts[0] == links.ELSEWHERE:
        path = place.removeprefix(f"{links.ELSEWHERE}/")
        if not (links.ROOT / path).is_file():
            return markdown  # a source file's or a folder's page, which has no links
    text, missing = diagrams.replaced(markdown, place)
    for name in missing:
        _log.warning(f"{path}: its diagram {name} is not drawn: run `python -m scripts.docs.diagrams`")
    return links.rewritten(text, path)
