"""Findings as CSV files that people look through and edit, and back again, checked.

Columns are the fields of the row types of `clustering.report.findings`, in any order when read. Rows may be deleted,
that is what a review is; everything else must fit.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from clustering.job.together import InputError
from clustering.report.findings import Copy, Duplicate, LabelState, Noise, Split

FILES: dict[str, type[Any]] = {
    "noise.csv": Noise,
    "duplicates.csv": Duplicate,
    "splits.csv": Split,
    "copies.csv": Copy,
    "classes.csv": LabelState,
}
_MOST = 2**53
Row = TypeVar("Row", bound=NamedTuple)


def table_text(kind: type[Row], rows: Iterable[Row]) -> str:
    """The rows of a type as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file, in its order; none for a file with nothing but its header.

    Raises InputError, naming the line, for a missing file, one that is not CSV in UTF-8, columns that are missing,
    unknown or twice there, and values of another kind.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(file), start=1) if any(cells)]
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it ({error.strerror}): name the folder that `report --out` wrote"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}): save it as CSV, UTF-8, separated by commas") from None
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    if sorted(header) != sorted(kind._fields):
        raise InputError(
            f"{path}: expected the columns {','.join(kind._fields)}, got {','.join(header):.200}: separate by commas, "
            "and delete rows only"
        )
    hints = get_type_hints(kind)
    place = [header.index(name) for name in kind._fields]
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}: line {number}: expected {len(header)} cells, got {len(cells)}")
        try:
            values = [
                _value(hints[name], name, cells[at].strip()) for name, at in zip(kind._fields, place, strict=True)
            ]
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from None
        rows.append(kind(*values))
    return rows


def _value(hint: Any, name: str, text: str) -> Any:
    """Raises ValueError that says what was expected."""
    if get_origin(hint) in (Union, UnionType):
        inner = next(kind for kind in get_args(hint) if kind is not NoneType)
        return None if text == "" else _value(inner, name, text)
    if get_origin(hint) is tuple:
        return tuple(_whole(name, item) for item in text.split())
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"{name}: expected {' or '.join(get_args(hint))}, got {text!r:.60}")
        return text
    if hint is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name}: expected 0 or 1, got {text!r:.60}")
        return text == "1"
    return _number(name, text) if hint is float else _whole(name, text)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {text!r:.60}")
    return value


def _whole(name: str, text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < len(str(_MOST))):
        raise ValueError(f"{name}: expected a whole number, got {text!r:.60}")
    return int(text)


def check_ids(path: Path, name: str, values: Sequence[int], *, least: int, total: int) -> None:
    """Raise InputError for a value that is not in [least, total)."""
    for value in values:
        if not least <= value < total:
            raise InputError(
                f"{path}: {name}: expected {least} … {total - 1}, got {value}: is the report of another set?"
            )
