"""Reading command lines, showing progress: what several subcommands have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
Run = Callable[[argparse.Namespace, Console], int]
"""Of a subcommand: its exit code."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, as for all that can be wrong."""
        self.exit(2, f"error: {message} ({self.prog} --help lists all)\n")


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return value

    return parse


def fraction(text: str) -> float:
    """Reads a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def progress_on(console: Console, *, counted: bool = True) -> Progress:
    """A bar with the time that remains, on terminals only. counted: how many of how many, else per cent."""
    how_far = MofNCompleteColumn() if counted else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), how_far, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def shown(items: Iterable[T], what: str, total: int, console: Console) -> Iterator[T]:
    """The items, with a bar."""
    with progress_on(console) as progress:
        yield from progress.track(items, total=total, description=what)
