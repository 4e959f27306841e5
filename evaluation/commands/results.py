"""Results of evaluations: tables on the terminal, and a folder of JSON, pictures, scores and a page of all of it."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.table
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape

from data.errors import DataError
from data.files import appearing
from evaluation.page import Summary, Table, render
from evaluation.plots import save_png
from evaluation.roc import TarAtFar

PAGE = "index.html"


def refuse_present(out: Path | None, names: Iterable[str], *, force: bool) -> None:
    """Raise DataError where one of the files is, or a page, before any work is done; not with force."""
    there = [name for name in (*names, PAGE) if out is not None and (out / name).exists()]
    if there and not force:
        raise DataError(f"{out}: expected no {there[0]} there: name another folder, or replace it with --force")


def refuse_ranks(why: str = "embeddings are there already, one process compares them") -> None:
    """Raise DataError under torchrun with several processes, which would all do the same and write the same files."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise DataError(f"expected one process, without torchrun: {why}")


def names_of(sets: Sequence[Path]) -> list[str]:
    """What files of sets are called in results. Raises DataError where two are called the same."""
    names = [path.stem for path in sets]
    if len(set(names)) < len(names):
        raise DataError(f"expected sets of different names, got {', '.join(map(str, sets))}")
    return names


def write_results(
    out: Path,
    name: str,
    content: Mapping[str, Any],
    summary: Summary,
    *,
    figures: Mapping[str, Figure] | None = None,
    arrays: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    """Write `out/name` (JSON) and, by their names, pictures and .npy files, and a page of the summary and the pictures:
    all appear, the JSON last, or none.

    Raises DataError when the folder cannot be written.
    """
    figures, arrays = figures or {}, arrays or {}
    names = [*figures, *arrays, PAGE, name]
    with appearing([out / each for each in names]) as partial:
        paths = dict(zip(names, partial, strict=True))
        for each, figure in figures.items():
            save_png(figure, paths[each])
        for each, array in arrays.items():
            with paths[each].open("wb") as file:
                np.save(file, array, allow_pickle=False)
        summary = summary._replace(facts=[*summary.facts, ("date", _now())])
        page = render(summary, {each: paths[each].read_bytes() for each in figures})
        text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
        # Names that are no UTF-8 are written as JSON's own escapes are.
        paths[PAGE].write_bytes(page.encode("utf-8", "backslashreplace"))
        paths[name].write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def show(table: Table) -> None:
    """On standard output; the first column is text, the others are numbers."""
    title = escape(_printable(table.title))
    shown = rich.table.Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, name in enumerate(table.header):
        shown.add_column(escape(_printable(name)), justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(escape(_printable(cell)) for cell in row))
    console = Console()
    console.print(shown)
    for note in table.notes:
        console.print(_printable(note), markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """As errors show it."""
    return str(DataError(text))


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
