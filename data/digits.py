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
_THREADS = 2
"""More do not help: what is left is making room in memory, one thread's work."""
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
    text: bytes
    """Whole lines, and MOST_DIGITS bytes in front of them, which the first number's words may reach into."""
    pairs: list[tuple[Ints, Ints]] | None = None


def pairs_of(path: Path) -> tuple[npt.NDArray[np.int32], Ints] | None:
    """Both columns of a file of lines `number<TAB>number`: int32 (n,), int64 (n,).

    None where a line is anything else, a number has more than MOST_DIGITS digits, or one of the first column is above
    int32: `numpy.loadtxt`, which takes ten times as long, can tell more. Memory: 12 bytes a line and some 30 MB. Raises
    OSError.
    """
    size, read, count = path.stat().st_size, 0, 0
    firsts, seconds = np.empty(0, np.int32), np.empty(0, np.int64)
    for piece in prefetch(_pieces(path), _read, rows=1, threads=_THREADS, ahead=2 * _THREADS):
        if piece.pairs is None:
            return None
        read += len(piece.text) - MOST_DIGITS
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
    return firsts[:count], seconds[:count]


def _pieces(path: Path) -> Iterator[_Piece]:
    """Pieces that end with a line. What has no line's end for too long is handed on as it is, and refused."""
    rest, front = b"", bytes(MOST_DIGITS)
    with path.open("rb") as file:
        while read := file.read(_PIECE):
            cut = read.rfind(b"\n") + 1
            if not cut and len(rest) + len(read) > _MOST_LINE:
                yield _Piece(front + rest + read)
                return
            yield _Piece(b"".join((front, rest, memoryview(read)[:cut])))
            rest = read[cut:]
    if rest:
        yield _Piece(front + rest + b"\n")


def _read(piece: _Piece, _: range) -> None:
    """Set `pairs`."""
    begin, parts = MOST_DIGITS, []
    try:
        while begin < len(piece.text):
            begin, part = _alike(piece.text, begin) or _unlike(piece.text, begin)
            parts.append(part)
    except _OddError:
        return
    piece.pairs = parts


def _alike(text: bytes, begin: int) -> tuple[int, tuple[Ints, Ints]] | None:
    """(end, numbers) of the lines from `begin` on that have their tab and their end where the first one has them.

    None: they are too few. No position of theirs has to be looked for, which is half of the time.
    """
    length = text.find(b"\n", begin) + 1 - begin
    tab = text.find(b"\t", begin) - begin
    count = (len(text) - begin) // max(length, 1)
    if count < _FEW:
        return None
    rows = np.frombuffer(text, np.uint8, count * length, begin).reshape(count, length)
    fits = (rows[:, tab] == _TAB) & (rows[:, -1] == _LINE) if 0 <= tab < length else np.zeros(1, np.bool_)
    if not fits.all():
        count = int(np.argmin(fits))
    if count < _FEW:
        return None

    def numbers(end: int, width: int) -> Ints:
        """That end before the byte `end` of a line."""
        low, high = (np.ndarray((count,), "<u8", text, begin + end - back, (length,)) for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, width)

    return begin + count * length, (numbers(tab, tab), numbers(length - 1, length - 2 - tab))


def _unlike(text: bytes, begin: int) -> tuple[int, tuple[Ints, Ints]]:
    """(end, numbers) of all lines from `begin` on."""
    rest = np.frombuffer(text, np.uint8, -1, begin)
    tab, line = np.flatnonzero(rest == _TAB), np.flatnonzero(rest == _LINE)
    if not len(line) or len(tab) != len(line) or line[-1] + 1 != len(rest):
        raise _OddError
    start = np.append(0, line[:-1] + 1)
    words: _Words = np.ndarray((len(text) - _WORD + 1,), "<u8", text, 0, (1,))  # that begin at each byte

    def numbers(end: Ints, width: Ints) -> Ints:
        low, high = (words[end + (begin - back)] for back in (_WORD, 2 * _WORD))
        return _numbers(low, high, width)

    return len(text), (numbers(tab, tab - start), numbers(line, line - tab - 1))


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
