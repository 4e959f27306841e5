"""Text files of whole numbers, a few on each line, read fast and with line numbers in errors.

Legend: L lines, C numbers on each, t bytes of a piece of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError

MOST_DIGITS = 18
"""Of a number: all such fit int64."""
_PIECE = 1 << 20
"""Bytes at a time; what a piece needs then stays in a processor's cache."""
_LONGEST = 1 << 12
"""Bytes of a line, beyond which it is refused unread."""
_ZERO, _NINE, _BLANKS, _LINE = ord("0"), 9, (ord(" "), ord("\t"), ord("\r")), ord("\n")
Ints = npt.NDArray[np.int64]


def read_columns(path: Path, columns: int) -> list[Ints]:
    """The C columns of a file of lines of C whole numbers parted by blanks or tabs: int64 (L,) each.

    Memory: 16 C bytes a line. Raises DataError for a file that cannot be read or is empty, and, with its number, for
    the first line that is anything else: signs, other counts, more than 18 digits, nothing.
    """
    parts: list[Ints] = []
    before = 0
    try:
        for piece in _pieces(path):
            part_LC = _numbers(piece, columns)
            if part_LC is None:
                raise _first_odd_line(path, piece, columns, before)
            parts.append(part_LC)
            before += len(part_LC)
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected lines of whole numbers") from None
    if not parts:
        raise DataError(f"{path}: expected lines of {columns} whole numbers, found an empty file")
    return [np.concatenate([part_LC[:, column] for part_LC in parts]) for column in range(columns)]


def columns_plainly(text: bytes, columns: int) -> list[list[int]]:
    """What `read_columns` finds in a file of this text, line by line, for tests. Raises ValueError."""
    rows = []
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), 1):
        if not _well_formed(line, columns):
            raise ValueError(f"line {number}")
        rows.append([int(word) for word in line.split()])
    return [list(column) for column in zip(*rows, strict=True)]


def _pieces(path: Path) -> Iterator[bytes]:
    """Whole lines, each with its end, the last line too."""
    rest = b""
    with path.open("rb") as file:
        while more := file.read(_PIECE):
            cut = more.rfind(b"\n") + 1
            if cut:
                yield rest + more[:cut]
                rest = more[cut:]
            else:
                rest += more
                if len(rest) > _LONGEST:  # no line of ours: do not gather a file of any size
                    break
    if rest:
        yield rest + b"\n"


def _numbers(piece: bytes, columns: int) -> Ints | None:
    """int64 (L, C), or None where a line is not C numbers."""
    text_t = np.frombuffer(b" " * MOST_DIGITS + piece, np.uint8)  # what stands before a number may be looked at
    value_t = text_t - np.uint8(_ZERO)  # wraps around below it
    digit_t = value_t <= _NINE
    line_t = text_t == _LINE
    blank_t = line_t.copy()
    for blank in _BLANKS:
        blank_t |= text_t == blank
    if not (digit_t | blank_t).all():
        return None
    edges = np.flatnonzero(digit_t[1:] != digit_t[:-1]) + 1  # the first byte is blank, the last a line's end
    ends = np.flatnonzero(line_t)
    if len(edges) != 2 * columns * len(ends):
        return None
    start_LC, stop_LC = edges[0::2].reshape(-1, columns), edges[1::2].reshape(-1, columns)
    if (stop_LC[:, -1] > ends).any() or (start_LC[1:, 0] < ends[:-1]).any():
        return None  # as many numbers in all, but not on each line
    width_LC = stop_LC - start_LC
    if width_LC.max() > MOST_DIGITS:
        return None
    least = int(width_LC.min())
    number_LC = np.zeros(start_LC.shape, np.int64)
    for place in range(int(width_LC.max())):  # ones, tens, hundreds …
        digit_LC = value_t[stop_LC - (1 + place)].astype(np.int64)
        if place >= least:
            digit_LC *= width_LC > place
        number_LC += digit_LC * 10**place
    return number_LC


def _first_odd_line(path: Path, piece: bytes, columns: int, before: int) -> DataError:
    lines = piece.removesuffix(b"\n").split(b"\n")
    number = next(number for number, line in enumerate(lines) if not _well_formed(line, columns))
    found = lines[number][:60].decode("utf-8", "replace")
    return DataError(
        f"{path}: line {before + number + 1}: expected {columns} whole numbers of at most {MOST_DIGITS} digits, found "
        f"{found!r}"
    )


def _well_formed(line: bytes, columns: int) -> bool:
    words = re.split(rb"[ \t\r]+", line.strip(b" \t\r"))
    return len(words) == columns and all(re.fullmatch(rb"[0-9]{1,%d}" % MOST_DIGITS, word) for word in words)
