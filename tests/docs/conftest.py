"""The site, built once; a folder to run a page's commands in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Forks

ROOT = Path(__file__).parents[2]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The site as `make docs` builds it, and the warnings of mkdocs and its plugins, which end `make docs`."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site") / "site"
    kept, log = _Kept(), logging.getLogger("mkdocs")
    log.addHandler(kept)
    before = Path.cwd()
    os.chdir(ROOT)  # where mkdocstrings looks for the packages
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    finally:
        os.chdir(before)
        log.removeHandler(kept)
    return folder, kept.lines


@pytest.fixture(scope="session")
def site(built: tuple[Path, list[str]]) -> Path:
    """Its folder."""
    return built[0]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Begins programs at once, see tests/forked.py."""
    started = Forks()
    yield started
    started.close()
