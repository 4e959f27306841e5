"""Headers of many records at once, read by their places in the memory map: some millions a second from memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.rec.header import HEADER, HeaderError, unpack
from data.rec.recordio import HEAD, LENGTH_BITS, MAGIC, MAX_LENGTH, WHOLE, RecordError, Records

_CHUNK = 1 << 20
"""Records at a time: some 100 MB of temporary arrays."""


class Heads(NamedTuple):
    """Arrays (n,), one row a record.

    flag: uint32. labels: float32 (n, 2), the first two labels, NaN where there is none. image_bytes: int64.
    end: int64, byte offset behind the record.
    """

    flag: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.float32]
    image_bytes: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]

    @property
    def is_identity(self) -> npt.NDArray[np.bool_]:
        """Which are identity headers: a range of two labels and no image."""
        identity: npt.NDArray[np.bool_] = (self.flag == 2) & (self.image_bytes == 0)
        return identity

    def rows(self, rows: slice) -> Heads:
        """Views of some rows."""
        return Heads(self.flag[rows], self.labels[rows], self.image_bytes[rows], self.end[rows])


def read_heads(reader: Records, offsets: npt.NDArray[np.int64]) -> Heads:
    """Headers of the records at `offsets` (n,), in that order.

    Raises RecordError where no record starts or its payload does not begin with a header.
    """
    heads = Heads(
        np.empty(len(offsets), np.uint32),
        np.empty((len(offsets), 2), np.float32),
        np.empty(len(offsets), np.int64),
        np.empty(len(offsets), np.int64),
    )
    for start in range(0, len(offsets), _CHUNK):
        rows = slice(start, start + _CHUNK)
        odd = _read_plain(reader, offsets[rows], heads.rows(rows))
        for row in start + odd:
            _read_one(reader, int(offsets[row]), heads, int(row))
    return heads


def _read_plain(reader: Records, offsets: npt.NDArray[np.int64], out: Heads) -> npt.NDArray[np.intp]:
    """Fill in the rows of undamaged records in one part; return the others' numbers."""
    if reader.size < 4:
        return np.arange(len(offsets))
    magic, head, flag, *labels = reader.words(offsets, (0, 1, 2, 3, 8, 9))  # 2 + 24 / 4 = 8
    inside, first, second = (word.view(np.float32) for word in labels)
    length = (head & MAX_LENGTH).astype(np.int64)
    out.flag[:] = flag
    out.labels[:, 0] = np.where(flag == 0, inside, first)
    out.labels[:, 1] = np.where(flag >= 2, second, np.nan)
    out.image_bytes[:] = length - HEADER.size - 4 * flag.astype(np.int64)
    out.end[:] = offsets + HEAD.size + (length + 3 & ~3)
    plain = (offsets >= 0) & (offsets % 4 == 0) & (magic == MAGIC) & (head >> LENGTH_BITS == WHOLE)
    plain &= (out.end <= reader.size) & (out.image_bytes >= 0)
    return np.flatnonzero(~plain)


def _read_one(reader: Records, offset: int, heads: Heads, row: int) -> None:
    try:
        header, image = unpack(reader.read_at(offset))
    except HeaderError as error:
        action = "pack the images with a tool that writes IRHeaders"
        raise RecordError(reader.path, offset, error.expected, error.found, action) from None
    heads.flag[row] = header.flag
    heads.labels[row] = (*header.labels, np.nan)[:2]
    heads.image_bytes[row] = len(image)
    heads.end[row] = reader.end_of(offset)
