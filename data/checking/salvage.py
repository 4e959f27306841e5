"""Records of a file that may be damaged: a scan that goes on behind the damage, and says where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.rec.header import HeaderError, unpack
from data.rec.recordio import (
    HEAD,
    LENGTH_BITS,
    MAGIC_BYTES,
    MAX_LENGTH,
    START,
    WHOLE,
    CutError,
    RecordError,
    RecordReader,
    aligned_magics,
)

_SAY_EVERY = 4096
_MOST_LABELS = 256
_IMAGES = (b"\xff\xd8", b"\x89P")


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no record."""

    offset: int
    end: int
    what: str


def salvage(reader: RecordReader, progress: Callable[[int], None] = lambda offset: None) -> Iterator[int | Damage]:
    """The offset of every whole record in file order, and the damage between them.

    Behind damage the scan goes on at the next place that begins like a record and is one to its end, with a header, and
    with another record or an image's first bytes to show for it. progress: called
    now and then with the byte offset reached.
    """
    offset, number = 0, 0
    while offset < reader.size:
        try:
            end = _end_of(reader, offset)
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


def _end_of(reader: RecordReader, offset: int) -> int:
    """Behind the record at `offset`. Raises RecordError where there is none, or its length cannot be right.

    A writer leaves no magic at a multiple of 4 bytes within a record. So if none stands behind one either, but within
    it, the length is damaged, and the records within are others. If there is none within, what follows is damaged.
    """
    end = reader.end_of(offset)
    if not _followed(reader, end):
        _, head = HEAD.unpack_from(reader.view, offset)
        within = _magic(reader, offset + len(MAGIC_BYTES), end)
        if head >> LENGTH_BITS == WHOLE and within < end:
            action = "the length is damaged"
            raise RecordError(reader.path, offset, "no record within a record", f"one at byte {within}", action)
    return end


def _followed(reader: RecordReader, end: int) -> bool:
    """Whether the file ends there, or another record begins."""
    return end == reader.size or bytes(reader.view[end : end + len(MAGIC_BYTES)]) == MAGIC_BYTES


def _facts(error: RecordError) -> str:
    """What its message says, without file and advice."""
    _, _, expected, found, _ = error.__reduce__()[1]
    return f"expected {expected}, found {found}"


def _next(reader: RecordReader, start: int) -> int:
    """Where the next record begins; the end of the file if none does."""
    offset = start + -start % 4
    while (offset := _magic(reader, offset, reader.size)) < reader.size:
        if _is_record(reader, offset):
            return offset
        offset += 4
    return reader.size


def _magic(reader: RecordReader, start: int, stop: int) -> int:
    """The first magic at a multiple of 4 bytes from `start`, which is one, or `stop`."""
    step = 1 << 16
    for begin in range(start, stop, step):
        piece = bytes(reader.view[begin : min(begin + step + len(MAGIC_BYTES) - 1, stop)])
        for at in aligned_magics(piece):
            return begin + at
    return stop


def _is_record(reader: RecordReader, offset: int) -> bool:
    if offset + HEAD.size > reader.size:
        return False
    _, head = HEAD.unpack_from(reader.view, offset)
    if head >> LENGTH_BITS not in (WHOLE, START) or head & MAX_LENGTH == 0:
        return False
    try:
        end = _end_of(reader, offset)
        header, image = unpack(reader.read_at(offset))
    except (RecordError, HeaderError):
        return False
    # Between two damaged records nothing follows: then it must look like an image's.
    return _followed(reader, end) or (header.flag < _MOST_LABELS and bytes(image[:2]) in _IMAGES)
