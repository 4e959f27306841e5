"""Tables of whole numbers read from text at some hundred megabytes a second: eight digits of a number at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.prefetch import prefetch

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_PIECE = 1 << 22
"""Bytes at a time."""
_THREADS, _AHEAD = 2, 4
"""As many as were measured to help, on two cores."""
_WORD = 8
MOST_DIGITS = 2 * _WORD
_FEW = 64
"""Lines of one shape at the start of a text, below which its lines are taken to be of many shapes."""
_MOST_LINE = 2 * MOST_DIGITS + 2
_MOST_FIRST = 2**31 - 1
_TAB, _LINE = 9, 10
_ONES = 0x0101010101010101


class _OddError(Exception):
    """A line is not two numbers of MOST_DIGITS digits at most."""


@dataclass(slots=True)
class _Piece:
    """Whole lines: the bytes MOST_DIGITS … end of a buffer. The first number's words may reach into those before."""

    text: bytearray
    end: int
    pairs: list[tuple[Ints, Ints]] | None = None


def pairs_of(path: Path) -> tuple[npt.NDArray[np.int32], Ints] | None:
    """Both columns of a file of lines `number<TAB>number`: int32 (n,), int64 (n,).

    None where a line is anything else, a number has more than MOST_DIGITS digits, or one of the first column is above
    int32: `numpy.loadtxt` can tell more. Memory: 12 bytes a line and some 50 MB. Raises OSError.
    """
    size, read, count = path.stat().st_size, 0, 0
    firsts, seconds = np.empty(0, np.int32), np.empty(0, np.int64)
    free = [bytearray(MOST_DIGITS + _MOST_LINE + min(_PIECE, size + 1)) for _ in range(_AHEAD + 2)]
    for piece in prefetch(_pieces(path, free), _read, rows=1, threads=_THREADS, ahead=_AHEAD):
        if piece.pairs is None:
            return None
        read += piece.end - MOST_DIGITS
        for first, second in piece.pairs:
            end = count + len(first)
            if end > len(firsts):
                # Lines grow longer towards the end; memory that is never written to is not there.
                room = max(end, int(end * 1.02 * max(size, read) / read))
                firsts = np.append(firsts[:count], np.empty(room - count, np.int32))
                seconds = np.append(seconds[:count], np.empty(room - count, np.int64))
            if first.max() > _MOST_FIRST:
                return None
            firsts[count:end], seconds[count:end] = first, second
            count = end
        free.append(piece.text)
    return firsts[:count], seconds[:count]


def _pieces(path: Path, free: list[bytearray]) -> Iterator[_Piece]:
    """Pieces that end with a line, in buffers taken from `free`: new ones would cost as much time as the reading.

    What has no line's end for too long is handed on as it is, and refused.
    """
    rest = b""
    with path.open("rb", buffering=0) as file:
        while True:
            text = free.pop()
            start = MOST_DIGITS + len(rest)
            text[MOST_DIGITS:start] = rest
            room = len(text) - MOST_DIGITS - _MOST_LINE
            end = start + file.readinto(memoryview(text)[start : start + room])
            if end == start:
                if rest:
                    text[end] = _LINE
                    yield _Piece(text, end + 1)
                return
            cut = max(text.rfind(b"\n", MOST_DIGITS, end) + 1, MOST_DIGITS)
            rest = bytes(text[cut:end])
            if len(rest) > _MOST_LINE:
                yield _Piece(text, end)
                return
            yield _Piece(text, cut)


def _read(piece: _Piece, _: range) -> None:
    """Set `pairs`."""
    begin, parts = MOST_DIGITS, []
    try:
        while begin < piece.end:
            begin, part = _alike(piece, begin) or _unlike(piece, begin)
            parts.append(part)
    except _OddError:
        return
    piece.pairs = parts


def _alike(piece: _Piece, begin: int) -> tuple[int, tuple[Ints, Ints]] | None:
    """(end, numbers) of the lines from `begin` on that have their tab and their end where the first one has them.

    None: they are too few. No position of theirs has to be looked for, which is half of the time.
    """
    text = piece.text
    length = text.find(b"\n", begin, piece.end) + 1 - begin
    tab = text.find(b"\t", begin, piece.end) - begin
    count = (piece.end - begin) // max(length, 1)
    if count < _FEW or not 0 <= tab < length:
        return None
    rows = np.frombuffer(text, np.uint8, count * length, begin).reshape(count, length)
    fits = (rows[:, tab] == _TAB) & (rows[:, -1] == _LINE)
    if not fits.all():
        count = int(np.argmin(fits))
    if count < _FEW:
        return None

    def numbers(end: int, width: int) -> Ints:
        """That end before the byte `end` of a line."""
        low, high = (np.ndarray((count,), "<u8", text, begin + end - back, (length,)) for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, width)

    return begin + count * length, (numbers(tab, tab), numbers(length - 1, length - 2 - tab))


def _unlike(piece: _Piece, begin: int) -> tuple[int, tuple[Ints, Ints]]:
    """(end, numbers) of all lines from `begin` on."""
    rest = np.frombuffer(piece.text, np.uint8, piece.end - begin, begin)
    tab, line = np.flatnonzero(rest == _TAB), np.flatnonzero(rest == _LINE)
    if not len(line) or len(tab) != len(line) or line[-1] + 1 != len(rest):
        raise _OddError
    start = np.append(0, line[:-1] + 1)
    words: _Words = np.ndarray((piece.end - _WORD + 1,), "<u8", piece.text, 0, (1,))  # that begin at each byte

    def numbers(end: Ints, width: Ints) -> Ints:
        low, high = (words[end + (begin - back)] for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, width)

    return piece.end, (numbers(tab, tab - start), numbers(line, line - tab - 1))


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
