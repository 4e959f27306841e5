"""Results of evaluations: tables on the terminal, and a folder of JSON, pictures and scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.errors import DataError
from data.files import appearing
from evaluation.plots import save_png
from evaluation.roc import TarAtFar


def refuse_present(out: Path | None, names: Iterable[str], *, force: bool) -> None:
    """Raise DataError where one of the files is, before any work is done; not with force."""
    there = [name for name in names if out is not None and (out / name).exists()]
    if there and not force:
        raise DataError(f"{out}: expected no {there[0]} there: name another folder, or replace it with --force")


def refuse_ranks() -> None:
    """Raise DataError under torchrun with several processes, which would all do the same and write the same files."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise DataError(
            "expected one process, without torchrun: embeddings are there already, one process compares them"
        )


def write_results(
    out: Path,
    name: str,
    content: Mapping[str, Any],
    *,
    figures: Mapping[str, Figure] | None = None,
    arrays: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    """Write `out/name` (JSON) and, by their names, pictures and .npy files: all appear, the JSON last, or none.

    Raises DataError when the folder cannot be written.
    """
    figures, arrays = figures or {}, arrays or {}
    names = [*figures, *arrays, name]
    with appearing([out / each for each in names]) as partial:
        paths = dict(zip(names, partial, strict=True))
        for each, figure in figures.items():
            save_png(figure, paths[each])
        for each, array in arrays.items():
            with paths[each].open("wb") as file:
                np.save(file, array, allow_pickle=False)
        text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
        paths[name].write_text(text + "\n", encoding="utf-8")


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> None:
    """A table on standard output; the first column is text, the others are numbers."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def rates(entries: Iterable[TarAtFar], *, found: str = "tar", asked: str = "far") -> list[dict[str, Any]]:
    """For JSON: null where there is no figure, with the reason, and for the threshold that is infinite."""
    named = []
    for entry in entries:
        fields: dict[str, Any] = {asked: entry.far, found: entry.tar, "threshold": entry.threshold}
        named.append({**fields, "reason": entry.reason} if entry.reason else fields)
    return named


def percent(value: float, digits: int = 2) -> str:
    """Nothing where there is no figure."""
    return "" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if isinstance(content, str | int | bool | None) else str(content)
