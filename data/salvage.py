"""Records of a file that may be damaged: a scan that goes on behind the damage, and says where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.header import HeaderError, unpack
from data.recordio import HEAD, LENGTH_BITS, MAGIC_BYTES, MAX_LENGTH, START, WHOLE, CutError, RecordError, RecordReader

_SAY_EVERY = 4096


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no record."""

    offset: int
    end: int
    what: str


def salvage(reader: RecordReader, progress: Callable[[int], None] = lambda offset: None) -> Iterator[int | Damage]:
    """The offset of every whole record in file order, and the damage between them.

    Behind damage the scan goes on at the next place that begins like a record and is one to its end, with a header: the
    format cuts payloads so that the magic stands at a multiple of 4 bytes only where a part begins. progress: called
    now and then with the byte offset reached.
    """
    offset, number = 0, 0
    while offset < reader.size:
        try:
            end = reader.end_of(offset)
        except RecordError as error:
            found = _next(reader, offset + 4)
            kind = "the file was cut" if isinstance(error, CutError) and found == reader.size else "no record"
            yield Damage(offset, found, f"{kind}: {_facts(error)}")
            offset = found
            continue
        yield offset
        offset = end
        number += 1
        if number % _SAY_EVERY == 0:
            progress(offset)
    progress(reader.size)


def _facts(error: RecordError) -> str:
    """What its message says, without file and advice."""
    _, _, expected, found, _ = error.__reduce__()[1]
    return f"expected {expected}, found {found}"


def _next(reader: RecordReader, start: int) -> int:
    """Where the next record begins; the end of the file if none does."""
    offset = start + -start % 4
    while (offset := _magic(reader, offset)) < reader.size:
        if _is_record(reader, offset):
            return offset
        offset += 4
    return reader.size


def _magic(reader: RecordReader, start: int) -> int:
    """The first magic at a multiple of 4 bytes from `start` on, or the end of the file."""
    step = 1 << 24
    for begin in range(start, reader.size, step):
        piece = bytes(reader.view[begin : begin + step + len(MAGIC_BYTES) - 1])
        at = piece.find(MAGIC_BYTES)
        while at >= 0:
            if (begin + at) % 4 == 0:
                return begin + at
            at = piece.find(MAGIC_BYTES, at + 1)
    return reader.size


def _is_record(reader: RecordReader, offset: int) -> bool:
    if offset + HEAD.size > reader.size:
        return False
    _, head = HEAD.unpack_from(reader.view, offset)
    if head >> LENGTH_BITS not in (WHOLE, START) or head & MAX_LENGTH == 0:
        return False
    try:
        end = reader.end_of(offset)
        unpack(reader.read_at(offset))
    except (RecordError, HeaderError):
        return False
    return end == reader.size or bytes(reader.view[end : end + len(MAGIC_BYTES)]) == MAGIC_BYTES
