"""Images set aside in files by their labels, as they come, to be packed in the order of the labels afterwards.

Where a parquet file has its labels mixed, reading it in their order would decode it once for each image. It is read
once instead, from front to back, and each image copied into one of up to 256 files, by its place in the order; each
file is small enough to stay in memory while it is read. The copies need as much room as the images.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import read_spans
from data.making.journal import Journal
from data.making.parquet import Cursor, ParquetSource, encode_cell

Ints = npt.NDArray[np.int64]
STEP = 1 << 14
"""Images between two steps of the journal, and of a file at least."""
_MOST_FILES = 256
"""Open at a time."""
_PLACES = "places"
_PLACE = struct.Struct("=qqq")  # file, byte offset, bytes
_NULL = -1
"""Bytes of an image that is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpilledSource:
    """Images of `origin` that `fill` sets aside in a folder; rows are (sample, row of `origin`)."""

    folder: Path
    origin: ParquetSource

    def encode(self, wanted: Ints) -> list[bytes | DataError]:
        """Raises DataError when the images are not there."""
        try:
            places = np.memmap(self.folder / _PLACES, np.int64, "r").reshape(-1, 3)[wanted[:, 0]]
            paths = [self.folder / str(number) for number in range(int(places[:, 0].max(initial=0)) + 1)]
            contents = list(read_spans(paths, places.clip(min=0).tolist()))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read it ({error.strerror})") from None
        return [
            encode_cell(None if size == _NULL else content, self.origin.where(*row))
            for content, size, (_, *row) in zip(contents, places[:, 2].tolist(), wanted.tolist(), strict=True)
        ]

    def listing(self) -> Iterator[str]:
        yield from self.origin.listing()

    def check(self) -> None:
        self.origin.check()

    def fill(self, rows: Ints, file_N: Ints, say: Callable[[str], None]) -> Iterator[int]:
        """Set aside the images at `rows` (N, 3), ascending, in the files `file_N`, and yield the number of each.

        Goes on where it was stopped, and says so; without a step in the journal nothing stays. Raises DataError.
        """
        digest = hashlib.sha256("\n".join(self.listing()).encode("utf-8", "surrogateescape"))
        digest.update(rows.tobytes() + file_N.tobytes())
        journal = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "journal").open("a+b") as file:
                journal = Journal(file, self.folder.joinpath)
                yield from self._fill(journal, digest.hexdigest(), rows, file_N, say)
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: cannot write it ({error.strerror})") from None
        finally:
            if journal is None or not journal.state.done:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _fill(
        self, journal: Journal, stamp: str, rows: Ints, file_N: Ints, say: Callable[[str], None]
    ) -> Iterator[int]:
        names = [_PLACES, *map(str, range(int(file_N.max()) + 1))]
        journal.resume()
        state = journal.state
        if journal.stamp != stamp or not all((self.folder / name).exists() for name in state.sizes):
            journal.begin(stamp)
            state = journal.state
        if state.finished:
            return
        if state.done:
            say(f"{self.folder}: going on to set images aside at image {state.done:,} of {len(rows):,}")
        cursor = Cursor(self.origin)
        with ExitStack() as stack:
            files = {name: stack.enter_context((self.folder / name).open("ab")) for name in names}
            for name, file in files.items():
                file.truncate(state.sizes.get(name, 0))
                file.seek(0, os.SEEK_END)

            def step(done: int) -> None:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                sizes = {name: file.tell() for name, file in files.items()}
                journal.add(done, sizes, [], finished=done == len(rows))

            for sample in range(state.done, len(rows)):
                cell = cursor.at(*rows[sample].tolist())
                number = int(file_N[sample])
                file = files[str(number)]
                size = _NULL if cell is None else len(cell)
                files[_PLACES].write(_PLACE.pack(number, file.tell(), size))
                file.write(cell or b"")
                if (sample + 1) % STEP == 0 or sample + 1 == len(rows):
                    step(sample + 1)
                yield sample


def files_of(order: Ints, total: int) -> Ints:
    """Number of the file for each of `total` samples, by its place in the order; for those not in it any."""
    file_N = np.zeros(total, np.int64)
    count = min(_MOST_FILES, 1 + len(order) // STEP)
    file_N[order] = np.arange(len(order)) * count // max(1, len(order))
    return file_N
