"""RecordIO files (`train.rec`) read in place through a memory map, and written as mxnet writes them.

A record is a u32 magic, a u32 head (cflag in bits 29-31, length in the low 29, both little-endian), the payload,
and zeros up to a multiple of 4 bytes. A payload that contains the magic at a multiple of 4 bytes is cut there into
parts, so that whoever looks for the magic finds starts of parts only; the magic itself is left out and put back
between the parts by the reader. The format has no checksum.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from data.errors import DataError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
OLD_MAGIC = 0x3ED7230A
HEAD = struct.Struct("<II")
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
"""Largest payload in bytes: what the length field holds, and the limit mxnet sets to the whole payload."""
WHOLE, START, MIDDLE, END = 0, 1, 2, 3
_PART_NAMES = {WHOLE: "a whole record", START: "the start of a record", MIDDLE: "a middle part", END: "an end part"}


Where = Path | str
"""A file or folder, or the address of one in an object store, such as s3://bucket/folder."""


class RecordError(DataError):
    """A record file is not as its format says: `<file>: byte <offset>: expected …, found … (what to do)`."""

    def __init__(self, path: Where, offset: int, expected: str, found: str, action: str) -> None:
        super().__init__(f"{path}: byte {offset}: expected {expected}, found {found} ({action})")
        self.path = path
        self.offset = offset
        self._parts = (path, offset, expected, found, action)

    def __reduce__(self) -> tuple[type[RecordError], tuple[Where, int, str, str, str]]:
        return type(self), self._parts  # raised in workers, shown by their parent


class CutError(RecordError):
    """The file ends inside a record."""


def rebuild_action(path: Where) -> str:
    """What to do about an index that does not fit its record file."""
    if isinstance(path, str):
        return "remove the index from the store: without one the file is scanned when it is opened"
    return f"rebuild the index with `python -m data index {path}`"


def images_only_action(path: Where) -> str:
    """What to do about identity headers that are wrong."""
    if isinstance(path, str):
        path = f"train.rec of a local copy of {path.rpartition('/')[0]}"
    return f"leave the identity headers out with `python -m data index --images-only {path}`"


def cut_action(path: Where) -> str:
    """What to do about a record file that was cut."""
    if isinstance(path, str):
        return "the file was cut: copy it to the store again"
    return f"the file was cut: copy it again, or keep its images with `python -m data index --images-only {path}`"


class Records:
    """Reads the records of some bytes by offset; safe to share between threads. `path` is for messages.

    A subclass says where the bytes are.
    """

    path: Where
    size: int

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes begin … end, both within the file."""
        raise NotImplementedError

    def words(self, offsets: npt.NDArray[np.int64], places: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
        """32-bit words at `offsets` (n,), rising, for each of `places`: so many words behind; uint32 (n,) each.

        What lies outside of the file is any other word of it.
        """
        raise NotImplementedError

    def ahead(self, offsets: npt.NDArray[np.int64]) -> None:
        """Records at these offsets are going to be read: a hint, for what is far away."""

    def close(self) -> None:
        """Let go of the file."""
        raise NotImplementedError

    def read_at(self, offset: int) -> memoryview:
        """Payload of the record that starts at a byte offset: a view into the file; of a record in parts, a copy.

        Raises RecordError when no record starts there or the file ends before the record does.
        """
        cflag, begin, end = self._part(offset)
        if cflag == WHOLE:
            return self.read(begin, end)
        spans = [(begin, end), *self._further_parts(offset, end)]
        return memoryview(MAGIC_BYTES.join(self.read(begin, end) for begin, end in spans))

    def end_of(self, offset: int) -> int:
        """Byte offset behind the record that starts at `offset`, padding included. Raises RecordError."""
        return self._extent(offset)[0]

    def scan(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, payload bytes) of every record from `start` on. Raises RecordError where the file is damaged."""
        offset = start
        while offset < self.size:
            end, length = self._extent(offset)
            yield offset, length
            offset = end

    def _extent(self, offset: int) -> tuple[int, int]:
        """(offset behind the record, payload bytes)."""
        cflag, begin, end = self._part(offset)
        length = end - begin
        if cflag == START:
            for part_begin, part_end in self._further_parts(offset, end):
                length += len(MAGIC_BYTES) + part_end - part_begin
                end = part_end
        return _aligned(end), length

    def _further_parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Spans (begin, end) of the middle and end parts of the record at `start`, whose first part ends at `end`."""
        cflag = START
        while cflag != END:
            cflag, begin, end = self._part(_aligned(end), further=True)
            yield begin, end

    def _part(self, offset: int, *, further: bool = False) -> tuple[int, int, int]:
        """(cflag, begin, end) of the payload of the part at `offset`; `further`: a part behind a record's first."""
        if not 0 <= offset < self.size:
            if further:
                raise CutError(self.path, offset, "a further part", f"the end at {self.size}", cut_action(self.path))
            action = f"the file was cut or the index is of another: copy it again, or {rebuild_action(self.path)}"
            raise RecordError(self.path, offset, "a record", f"a file of {self.size} bytes", action)
        if offset % 4:
            raise RecordError(
                self.path, offset, "an offset that is a multiple of 4", f"{offset}", rebuild_action(self.path)
            )
        begin = offset + HEAD.size
        if begin > self.size:
            found = f"{self.size - offset} bytes to the end of the file"
            raise CutError(self.path, offset, f"a record head of {HEAD.size} bytes", found, cut_action(self.path))
        magic, head = HEAD.unpack(self.read(offset, begin))
        if magic != MAGIC:
            self._refuse_magic(offset, magic)
        cflag, length = head >> LENGTH_BITS, head & MAX_LENGTH
        if cflag not in ((MIDDLE, END) if further else (WHOLE, START)):
            expected = "a middle or end part" if further else "the start of a record"
            raise RecordError(
                self.path, offset, expected, _PART_NAMES.get(cflag, f"unknown cflag {cflag}"), rebuild_action(self.path)
            )
        end = begin + length
        if _aligned(end) > self.size:
            expected = f"{_aligned(end) - begin} bytes of payload and padding"
            raise CutError(
                self.path, offset, expected, f"{self.size - begin} to the end of the file", cut_action(self.path)
            )
        return cflag, begin, end

    def _refuse_magic(self, offset: int, magic: int) -> None:
        if magic == OLD_MAGIC:
            found, action = f"{OLD_MAGIC:#010x}, an older dmlc variant", "pack the set again with current tools"
        else:
            found, action = (
                f"{magic:#010x}",
                f"not a record file, damaged, or the index of another: {rebuild_action(self.path)}",
            )
        raise RecordError(self.path, offset, f"magic {MAGIC:#010x}", found, action)


class RecordReader(Records):
    """Reads a file through a memory map, without copies; pickled by its path. `view` is the whole file, read-only."""

    path: Path

    def __init__(self, path: Path) -> None:
        """Map the file. Raises DataError when it is missing or cannot be read."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = file.seek(0, 2)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as error:
            raise DataError(f"{self.path}: cannot read it ({error.strerror}): expected a record file") from None
        self.view = memoryview(self._map if self._map is not None else b"")

    def __reduce__(self) -> tuple[type[RecordReader], tuple[Path]]:
        return RecordReader, (self.path,)

    def read(self, begin: int, end: int) -> memoryview:
        """See `Records`: a view."""
        return self.view[begin:end]

    def words(self, offsets: npt.NDArray[np.int64], places: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
        """See `Records`."""
        words = np.frombuffer(self.view[: self.size // 4 * 4], "<u4")
        return [words[np.clip(offsets // 4 + place, 0, len(words) - 1)] for place in places]

    def close(self) -> None:
        """Unmap the file; payloads that are still held keep the map alive until they are gone."""
        with contextlib.suppress(BufferError):  # views are still held
            self.view.release()
            if self._map is not None:
                self._map.close()


class RecordWriter:
    """Writes records one behind the other; a context manager. `offset` is where the next record starts."""

    def __init__(self, path: Path) -> None:
        """Create or overwrite the file. Raises DataError when it cannot be written."""
        self.path = Path(path)
        self.offset = 0
        try:
            self._file = self.path.open("wb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot write it ({error.strerror})") from None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, payload: bytes) -> int:
        """Append one record, in parts where the payload holds the magic at a multiple of 4 bytes; return its offset.

        Raises RecordError for payloads above MAX_LENGTH bytes.
        """
        if len(payload) > MAX_LENGTH:
            raise RecordError(
                self.path,
                self.offset,
                f"a payload of at most {MAX_LENGTH} bytes",
                f"{len(payload)}",
                "store it smaller",
            )
        offset = self.offset
        begin, cflag = 0, START
        for cut in aligned_magics(payload):
            self._write_part(cflag, payload[begin:cut])
            begin, cflag = cut + len(MAGIC_BYTES), MIDDLE
        self._write_part(END if begin else WHOLE, payload[begin:] if begin else payload)
        return offset

    def close(self) -> None:
        self._file.close()

    def _write_part(self, cflag: int, part: bytes) -> None:
        padding = bytes(-len(part) % 4)
        self._file.write(HEAD.pack(MAGIC, cflag << LENGTH_BITS | len(part)))
        self._file.write(part)
        self._file.write(padding)
        self.offset += HEAD.size + len(part) + len(padding)


def _aligned(offset: int) -> int:
    return offset + 3 & ~3


def aligned_magics(payload: bytes) -> Iterator[int]:
    """Positions of the magic in the payload that are multiples of 4."""
    position = payload.find(MAGIC_BYTES)
    while position >= 0:
        if position % 4 == 0:
            yield position
            position = payload.find(MAGIC_BYTES, position + len(MAGIC_BYTES))
        else:
            position = payload.find(MAGIC_BYTES, position + 1)
