"""Tables of whole numbers read from text at some hundred megabytes a second: eight digits of a number at a time.

Legend: L lines, C numbers on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.loading.prefetch import prefetch

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_PIECE = 1 << 20
"""Bytes at a time: what is made of them stays in a core's cache."""
_THREADS, _AHEAD = 2, 4
"""As many as were measured to help, on two cores."""
_WORD = 8
MOST_DIGITS = 2 * _WORD
_FEW = 4096
"""Lines of one shape at the start of a text, below which its lines are taken to be of many shapes."""
_LINE = ord("\n")
_ONES = 0x0101010101010101


class _OddError(Exception):
    """A line is not C numbers of MOST_DIGITS digits at most."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Of a line: how many numbers, and the byte between two of them."""

    columns: int
    separator: int

    @property
    def longest(self) -> int:
        """Bytes of a line at the most."""
        return self.columns * (MOST_DIGITS + 1)


@dataclass(slots=True)
class _Piece:
    """Whole lines: the bytes MOST_DIGITS … end of a buffer. The first number's words may reach into those before."""

    text: bytearray
    end: int
    parts: list[list[Ints]] | None = None
    """The columns of some lines, of those after them, and so on."""


def pairs_of(path: Path) -> tuple[npt.NDArray[np.int32], Ints] | None:
    """Both columns of a file of lines `number<TAB>number`: int32 (L,), int64 (L,). See `columns_of`."""
    found = columns_of(path, (np.int32, np.int64), b"\t")
    return None if found is None else (found[0], found[1])


def columns_of(
    path: Path, kinds: Sequence[type[np.int32] | type[np.int64]], separator: bytes
) -> list[npt.NDArray[Any]] | None:
    """The C columns (L,) of a file of lines of C whole numbers with one separator, a byte, between two of them.

    kinds: dtypes of the columns. None where a line is anything else, a number has more than MOST_DIGITS digits, or one
    is above its dtype: slower readers can tell more. Memory: that of the columns and some 50 MB. Raises OSError.
    """
    form = _Form(len(kinds), separator[0])
    size, read, count = path.stat().st_size, 0, 0
    columns: list[npt.NDArray[Any]] = [np.empty(0, kind) for kind in kinds]
    free = [bytearray(MOST_DIGITS + form.longest + min(_PIECE, size + 1)) for _ in range(_AHEAD + 2)]

    def work(piece: _Piece, _: range) -> None:
        piece.parts = _read(piece, form)

    for piece in prefetch(_pieces(path, free, form.longest), work, rows=1, threads=_THREADS, ahead=_AHEAD):
        if piece.parts is None:
            return None
        read += piece.end - MOST_DIGITS
        for part in piece.parts:
            end = count + len(part[0])
            if end > len(columns[0]):
                # Lines grow longer towards the end; memory that is never written to is not there.
                room = max(end, int(end * 1.02 * max(size, read) / read))
                columns = [np.append(old[:count], np.empty(room - count, old.dtype)) for old in columns]
            for column, values in zip(columns, part, strict=True):
                if column.dtype != values.dtype and values.max() > np.iinfo(column.dtype).max:
                    return None
                column[count:end] = values
            count = end
        free.append(piece.text)
    return [column[:count] for column in columns]


def _pieces(path: Path, free: list[bytearray], longest: int) -> Iterator[_Piece]:
    """Pieces that end with a line, in buffers taken from `free`: new ones would cost as much time as the reading.

    What has no line's end for too long is handed on as it is, and refused.
    """
    rest = b""
    with path.open("rb", buffering=0) as file:
        while True:
            text = free.pop()
            start = MOST_DIGITS + len(rest)
            text[MOST_DIGITS:start] = rest
            room = len(text) - MOST_DIGITS - longest
            end = start + file.readinto(memoryview(text)[start : start + room])
            if end == start:
                if rest:
                    text[end] = _LINE
                    yield _Piece(text, end + 1)
                return
            cut = max(text.rfind(b"\n", MOST_DIGITS, end) + 1, MOST_DIGITS)
            rest = bytes(text[cut:end])
            if len(rest) > longest:
                yield _Piece(text, end)
                return
            yield _Piece(text, cut)


def _read(piece: _Piece, form: _Form) -> list[list[Ints]] | None:
    """See `_Piece.parts`; None for a line that is odd."""
    begin, parts = MOST_DIGITS, []
    try:
        while begin < piece.end:
            begin, part = _alike(piece, begin, form) or _unlike(piece, begin, form)
            parts.append(part)
    except _OddError:
        return None
    return parts


def _alike(piece: _Piece, begin: int, form: _Form) -> tuple[int, list[Ints]] | None:
    """(end, columns) of the lines from `begin` on that have separators and end where the first one has them.

    None: they are too few. No position of theirs has to be looked for, which is half of the time.
    """
    text = piece.text
    length = text.find(b"\n", begin, piece.end) + 1 - begin
    count = (piece.end - begin) // max(length, 1)
    if count < _FEW or not 0 < length <= form.longest:
        return None
    rows = np.frombuffer(text, np.uint8, count * length, begin).reshape(count, length)
    ends = [*np.flatnonzero(rows[0] == form.separator).tolist(), length - 1]
    if len(ends) != form.columns:
        return None
    fits = rows[:, -1] == _LINE
    for end in ends[:-1]:
        fits &= rows[:, end] == form.separator
    if not fits.all():
        count = int(np.argmin(fits))
    if count < _FEW:
        return None

    def numbers(end: int, width: int) -> Ints:
        """That end before the byte `end` of a line."""
        low, high = (np.ndarray((count,), "<u8", text, begin + end - back, (length,)) for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, width)

    starts = [0, *(end + 1 for end in ends[:-1])]
    return begin + count * length, [numbers(end, end - start) for start, end in zip(starts, ends, strict=True)]


def _unlike(piece: _Piece, begin: int, form: _Form) -> tuple[int, list[Ints]]:
    """(end, columns) of all lines from `begin` on."""
    rest = np.frombuffer(piece.text, np.uint8, piece.end - begin, begin)
    line_L, separators = np.flatnonzero(rest == _LINE), np.flatnonzero(rest == form.separator)
    if not len(line_L) or len(separators) != len(line_L) * (form.columns - 1) or line_L[-1] + 1 != len(rest):
        raise _OddError
    words: _Words = np.ndarray((piece.end - _WORD + 1,), "<u8", piece.text, 0, (1,))  # that begin at each byte

    def numbers(start_L: Ints, end_L: Ints) -> Ints:
        low, high = (words[end_L + (begin - back)] for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, end_L - start_L)

    # Where the separators are not as many on each line, some number begins behind its end.
    ends = [*np.ascontiguousarray(separators.reshape(len(line_L), -1).T), line_L]
    starts = [np.append(0, line_L[:-1] + 1), *(end_L + 1 for end_L in ends[:-1])]
    return piece.end, [numbers(start_L, end_L) for start_L, end_L in zip(starts, ends, strict=True)]


def _numbers(low: _Words, high: _Words, width: Ints | int) -> Ints:
    """Numbers of `width` digits, of which `low` holds the last eight and `high` those before."""
    if np.min(width) < 1 or np.max(width) > MOST_DIGITS:
        raise _OddError
    number = _eight(low, np.minimum(width, _WORD))
    if np.max(width) > _WORD:
        more = _eight(high, np.maximum(width, _WORD) - _WORD)
        more *= np.uint64(10**_WORD)
        number += more
    return number.view(np.int64)


def _eight(words: _Words, width: Ints | int) -> _Words:
    """Numbers of the last `width` bytes of words: neighbouring digits, then pairs, then fours of a word at once."""
    word = words ^ np.uint64(0x30 * _ONES)
    # Little-endian: the last digit is the highest byte. What stands before the first one is shifted out, in two shifts,
    # as one by 64 bits, where none of the word belongs to the number, means nothing.
    if np.min(width) < _WORD:
        shift = np.asarray((_WORD - width) * 4, np.uint64)
        word >>= shift
        word >>= shift
        word <<= shift
        word <<= shift
    if np.bitwise_or.reduce((word + np.uint64(6 * _ONES)) | word) & np.uint64(0xF0 * _ONES):
        raise _OddError
    upper = word >> np.uint64(8)
    word *= np.uint64(10)
    word += upper
    mask = np.uint64(0x000000FF000000FF)
    np.bitwise_and(word, mask, out=upper)
    upper *= np.uint64(100 + (1000000 << 32))
    word >>= np.uint64(16)
    word &= mask
    word *= np.uint64(1 + (10000 << 32))
    word += upper
    word >>= np.uint64(32)
    return word
