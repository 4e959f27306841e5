"""Packs images into `train.rec`, `train.idx` and `property` as insightface's builder lays them out, on many cores."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.making.sources import Source
from data.rec.header import EXACT, Header, class_labels, pack
from data.rec.recordio import RecordWriter

_CHUNK = 64
"""Images a task of a worker: a second of rendering at most, some 0.5 MB to hand back."""
_AHEAD = 4
"""Tasks each worker may be ahead of the writer: bounds the memory."""

Rows = npt.NDArray[np.int64]
Encoded = bytes | DataError


class Encoder:
    """Encodes images of some sources on `workers` processes (1: in this one); a context manager."""

    def __init__(self, workers: int, *sources: Source) -> None:
        self._sources = sources
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Spawned: a fork of a process with threads (progress bar, BLAS) may inherit a held lock.
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (sources,))
        self._ahead = workers * _AHEAD

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, source: Source, wanted: Rows) -> Iterator[Encoded]:
        """Encoded images of the rows of `wanted` (N, what the source goes by), in that order."""
        chunks = (wanted[start : start + _CHUNK] for start in range(0, len(wanted), _CHUNK))
        if self._pool is None:
            for chunk in chunks:
                yield from source.encode(chunk)
            return
        number = next(i for i, known in enumerate(self._sources) if known is source)
        running: deque[Future[list[Encoded]]] = deque()
        try:
            for chunk in chunks:
                running.append(self._pool.submit(_encode, number, chunk))
                if len(running) >= self._ahead:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a packing process ended by itself: expected memory for each; try fewer with --workers"
            ) from None


_sources: tuple[Source, ...] = ()
"""In a worker: what it encodes from, given to it once, as it may be long lists of names."""


def _start_worker(sources: tuple[Source, ...]) -> None:
    global _sources  # noqa: PLW0603
    _sources = sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode(number: int, wanted: Rows) -> list[Encoded]:
    return _sources[number].encode(wanted)


class SetWriter:
    """Writes images at keys 1..N and the identity headers behind them to an open record file and its index."""

    def __init__(self, writer: RecordWriter, index: TextIO, num_classes: int, counts: Rows | None = None) -> None:
        """counts (num_classes,): images of each class that are there already, to go on behind them."""
        self._writer = writer
        self._index = index
        self._counts = np.zeros(num_classes, np.int64) if counts is None else counts
        self._pair = num_classes > EXACT
        self.count = int(self._counts.sum())
        self._previous = int(np.flatnonzero(self._counts)[-1]) if self.count else 0

    def write(self, label: int, image: bytes) -> None:
        """Append an image; labels ascend. Raises DataError."""
        if not self._previous <= label < len(self._counts):
            raise DataError(
                f"{self._writer.path}: expected labels ascending from {self._previous} to {len(self._counts) - 1}, got "
                f"{label}"
            )
        self._previous = label
        self._counts[label] += 1
        self.count += 1
        header = Header(2 if self._pair else 0, class_labels(label, pair=self._pair), self.count, 0)
        self._write(self.count, header, image)

    def write_headers(self) -> None:
        """Append the identity headers, an empty range for classes without images, and key 0."""
        first = self.count + 1
        ends = 1 + np.cumsum(self._counts)
        for key, (count, end) in enumerate(zip(self._counts.tolist(), ends.tolist(), strict=True), start=first):
            self._write(key, Header(2, (float(end - count), float(end)), key, 0), b"")
        self._write(0, Header(2, (float(first), float(first + len(ends))), 0, 0), b"")

    def _write(self, key: int, header: Header, image: bytes) -> None:
        self._index.write(f"{key}\t{self._writer.write(pack(header, image))}\n")


def write_records(rec: Path, idx: Path, images: Iterable[tuple[int, bytes]], *, num_classes: int) -> int:
    """Write images at keys 1..N, the identity headers behind them, key 0 last; return N.

    images: (label, encoded image), labels ascending, so that the keys of each class are one range. Classes without
    images get an empty range. Labels are stored as pairs when num_classes is above 2^24. Raises DataError.
    """
    with RecordWriter(rec) as writer, idx.open("w", encoding="ascii") as index:
        records = SetWriter(writer, index, num_classes)
        for label, image in images:
            records.write(label, image)
        records.write_headers()
    return records.count


def write_sequence(rec: Path, idx: Path, images: Iterable[tuple[int, bytes]], *, num_classes: int) -> int:
    """Write images at keys 0 … N - 1, in the order given, without identity headers; return N.

    images: (label, encoded image). Labels are stored as pairs when num_classes is above 2^24. Raises DataError.
    """
    pair = num_classes > EXACT
    count = 0
    with RecordWriter(rec) as writer, idx.open("w", encoding="ascii") as index:
        for count, (label, image) in enumerate(images, start=1):
            if not 0 <= label < num_classes:
                raise DataError(f"{rec}: expected labels from 0 to {num_classes - 1}, got {label}")
            header = Header(2 if pair else 0, class_labels(label, pair=pair), count - 1, 0)
            index.write(f"{count - 1}\t{writer.write(pack(header, image))}\n")
    return count


def encode_all(encoder: Encoder, source: Source, wanted: Rows) -> Iterator[bytes]:
    """Encoded images of the rows of `wanted`. Raises DataError when one cannot be had."""
    for image in encoder.encode(source, wanted):
        if isinstance(image, DataError):
            raise DataError(
                f"{image} (repair it in place: a pair needs both of its images, and without this one all begins anew)"
            )
        yield image


def every_image(images: Sequence[int]) -> Rows:
    """Rows (identity, image number) of every image, by identity: int64 (N, 2)."""
    numbers = itertools.chain.from_iterable(range(count) for count in images)
    identities = np.repeat(np.arange(len(images)), images)
    return np.stack([identities, np.fromiter(numbers, np.int64, count=len(identities))], axis=1)
