"""Text files of whole numbers, a few on each line, read fast and with line numbers in errors.

Legend: L lines, C numbers on each.
"""

from __future__ import annotations

import re
from array import array
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.rec.digits import columns_of
from evaluation.embed.files import Ints

MOST_DIGITS = 18
"""Of a number: all such fit int64."""
_LONGEST = 1 << 12
"""Bytes of a line, beyond which it is refused unread."""


def read_columns(path: Path, columns: int) -> list[Ints]:
    """The C columns of a file of lines of C whole numbers parted by blanks or tabs: int64 (L,) each.

    Lines that all have one blank, or all one tab, between two numbers are read by `data.rec.digits`, others one by one,
    at a fraction of the speed. Memory: 8 C bytes a line and some 50 MB. Raises DataError for a file that cannot be read
    or is empty, and, with its number, for the first line that is anything else: signs, other counts, more than 18
    digits, nothing.
    """
    try:
        found = columns_of(path, (np.int64,) * columns, _separator(path)) or _one_by_one(path, columns)
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected lines of whole numbers") from None
    if not len(found[0]):
        raise DataError(f"{path}: expected lines of {columns} whole numbers, found an empty file")
    return found


def _separator(path: Path) -> bytes:
    """The first one in the file, a blank or a tab; a blank where it has none."""
    with path.open("rb") as file:
        first = re.search(rb"[ \t]", file.read(_LONGEST))
    return first[0] if first else b" "


def _one_by_one(path: Path, columns: int) -> list[Ints]:
    """The same, slowly. Raises DataError for the first odd line."""
    blank, whole = rb"[ \t\r]", rb"([0-9]{1,%d})" % MOST_DIGITS
    form = re.compile(rb"%b*%b%b*\n?" % (blank, (blank + rb"+").join([whole] * columns), blank))
    numbers = array("q")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST):
            number += 1
            words = form.fullmatch(line)
            if words is None or (len(line) == _LONGEST and not line.endswith(b"\n")):
                found = line.removesuffix(b"\n")[:60].decode("utf-8", "replace")
                raise DataError(
                    f"{path}: line {number}: expected {columns} whole numbers of at most {MOST_DIGITS} digits, found "
                    f"{found!r}"
                )
            numbers.extend(map(int, words.groups()))
    table_LC = np.frombuffer(numbers, np.int64).reshape(-1, columns)
    return [np.ascontiguousarray(column_L) for column_L in table_LC.T]
