"""A record file of an object store: images through blocks, the headers of many records by ranges of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data.loading.prefetch import prefetch
from data.rec.recordio import Records
from data.stores.blocks import BLOCK, Blocks, Fetch, get

_GAP = 1 << 16
"""Bytes between two headers that are rather read than asked for twice."""
_SPAN = 1 << 23
_SPANS = 16
"""Asked for at a time; and blocks ahead of a scan."""


@dataclass(slots=True)
class _Span:
    begin: int
    end: int
    rows: slice | None = None
    """Of what it holds the headers of; None: it is a piece of a file."""
    data: bytes | memoryview = b""


class RemoteRecords(Records):
    """path: its address. blocks: of the file."""

    def __init__(self, path: str, size: int, fetch: Fetch, blocks: Blocks) -> None:
        self.path, self.size = path, size
        self._name, self._fetch, self._blocks = path, fetch, blocks

    def read(self, begin: int, end: int) -> memoryview:
        """See `Records`. Raises DataError when the store does not give the bytes."""
        return self._blocks.read(begin, end)

    def ahead(self, offsets: npt.NDArray[np.int64]) -> None:
        """See `Records`."""
        self._blocks.ahead(np.unique(offsets // BLOCK).tolist())

    def scan(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """See `Records`: the blocks behind are got meanwhile."""
        announced = start // BLOCK
        for offset, length in super().scan(start):
            wanted = min(offset // BLOCK + _SPANS, -(-self.size // BLOCK))
            if wanted > announced:
                self._blocks.ahead(range(announced, wanted))
                announced = wanted
            yield offset, length

    def words(self, offsets: npt.NDArray[np.int64], places: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
        """See `Records`. Of what is not in blocks on the disk nothing is kept: blocks are for images."""
        reach = 4 * (max(places) + 1)
        found = [np.empty(len(offsets), np.uint32) for _ in places]

        def arrive(span: _Span, _: range) -> None:
            if all(map(self._blocks.has, range(span.begin // BLOCK, (span.end - 1) // BLOCK + 1))):
                span.data = self._blocks.read(span.begin, span.end)
            else:
                span.data = get(self._name, self._fetch, span.begin, span.end)

        for span in prefetch(self._spans(offsets, reach), arrive, rows=1, threads=_SPANS, ahead=_SPANS):
            words = np.frombuffer(bytes(span.data) + bytes(reach + 4 - len(span.data) % 4), "<u4")
            rows = span.rows or slice(0)
            at = (offsets[rows] - span.begin) // 4
            for out, place in zip(found, places, strict=True):
                out[rows] = words[np.clip(at + place, 0, len(words) - 1)]
        return found

    def close(self) -> None:
        """See `Records`."""
        self._blocks.close()

    def _spans(self, offsets: npt.NDArray[np.int64], reach: int) -> Iterator[_Span]:
        """Ranges of bytes with all the headers."""
        begins = np.clip(offsets // 4 * 4, 0, max(0, self.size - 1))
        far = (np.diff(begins) > _GAP) | (np.diff(begins) < 0) | (np.diff(begins // _SPAN) != 0)
        starts = [0, *(np.flatnonzero(far) + 1).tolist(), len(begins)]
        for start, stop in pairwise(starts):
            if start < stop:
                end = min(int(begins[stop - 1]) + reach, self.size)
                yield _Span(int(begins[start]), end, slice(start, stop))


def pieces(name: str, size: int, fetch: Fetch) -> Iterator[bytes | memoryview]:
    """A whole file from front to back, several pieces at a time."""

    def arrive(span: _Span, _: range) -> None:
        span.data = get(name, fetch, span.begin, span.end)

    spans = (_Span(begin, min(begin + _SPAN, size)) for begin in range(0, size, _SPAN))
    for span in prefetch(spans, arrive, rows=1, threads=_SPANS, ahead=_SPANS):
        yield span.data
