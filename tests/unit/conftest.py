"""Fixtures that several of these files share."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.sinks import Report, begin


@pytest.fixture
def lines() -> list[str]:
    """What was said."""
    return []


@pytest.fixture
def report(tmp_path: Path, lines: list[str]) -> Report:
    """`begin` in the folder "my run"."""
    return functools.partial(begin, tmp_path / "my run", lines)
