"""A set that is being packed: its files grow under hidden names, a journal beside them, and appear at the end.

Whatever stops the work, the same job goes on at the last step of the journal, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.files import refuse_existing, synced
from data.making.journal import Journal
from data.making.pack import Encoded, Rows, SetWriter
from data.rec.recordio import RecordWriter

STEP = 4096
"""Images between two steps of the journal: some seconds of work."""
REC, IDX = "train.rec", "train.idx"
SPILL = ".pack.spill"
"""A folder for what a source sets aside meanwhile."""
_JOURNAL = ".pack.journal"


class PartialSet:
    """The files of a set under hidden names in its folder; a context manager, for one process at a time.

    On an error or interrupt what the journal knows of stays, to go on there; without a step in it nothing does.
    """

    def __init__(self, out: Path, names: Sequence[str], others: Sequence[str], *, force: bool) -> None:
        """names: of the files, the index last; others: what a set that is replaced may have beside.

        Locks the folder. Raises DataError where a set is, unless `force`, or another process packs there.
        """
        self.out = out
        self.note = ""
        self._over = False
        self._names = names
        self._others = [name for name in others if name not in names]
        self._force = force
        self._journal_path = out / _JOURNAL
        self._spill = out / SPILL
        if not self._journal_path.exists():
            self._refuse_existing()
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: expected a folder, or nothing yet, found a file: name another with --out")
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._journal_path)
        except OSError as error:
            self._remove_made()
            raise _cannot_write(error, out) from None
        self._journal = Journal(self._lock, self._place)

    def __enter__(self) -> PartialSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        try:
            if not (self._over or self.resumable):
                self._clear()
                self._journal_path.unlink(missing_ok=True)
                self._remove_made()
        except OSError as error:
            raise _cannot_write(error, self.out) from None
        finally:
            self._lock.close()
        if isinstance(value, OSError):
            raise _cannot_write(value, self.out) from None

    @property
    def done(self) -> int:
        """Images that were packed or left out by the last step."""
        return self._journal.state.done

    @property
    def left_out(self) -> list[int]:
        """Which of them were left out."""
        return self._journal.state.left_out

    @property
    def finished(self) -> bool:
        """All files are written; they only have to appear."""
        return self._journal.state.finished

    @property
    def resumable(self) -> bool:
        """Something is there that the same job can go on with."""
        return self.done > 0 or self._spill.exists()

    def path(self, name: str) -> Path:
        """Where a file is until it appears."""
        return self.out / f".{name}.part"

    def resume(self, stamp: str, total: int, *, skip_bad: bool) -> None:
        """Go on with the job of that stamp, or start anew where something else is there; `note` says which.

        Raises DataError where a set is, unless it may be replaced or the rest of it has only to appear.
        """
        self._journal.resume()
        state = self._journal.state
        if state.finished and self._journal.stamp == stamp:
            return
        self._refuse_existing()
        whole = all(self.path(name).exists() for name in state.sizes)
        if self._journal.stamp != stamp or not whole or (state.left_out and not skip_bad):
            if self._spill.exists() or any(self.path(name).exists() for name in self._names):
                self.note = f"{self.out}: what was left there is of another pack, or damaged: starting anew"
            self._clear()
            self._journal.begin(stamp)
            return
        for name in self._names:
            if self.path(name).exists():
                os.truncate(self.path(name), state.sizes.get(name, 0))
        if state.done:
            self.note = f"{self.out}: going on at image {state.done:,} of {total:,}"

    def write_records(
        self, images: Iterable[Encoded], labels: Rows, num_classes: int, on_bad: Callable[[DataError], None]
    ) -> None:
        """Write the records and their index from `done` on: images and labels of all that follow.

        Images that cannot be had go to `on_bad`, which may raise, and are left out.
        """
        start, counts = self.done, np.zeros(num_classes, np.int64)
        kept = np.delete(labels[:start], self.left_out)
        counts += np.bincount(kept, minlength=num_classes)
        left_out: list[int] = []
        writer = _Continued(self.path(REC))
        with writer, self.path(IDX).open("a", encoding="ascii") as index:

            def step(done: int) -> None:
                index.flush()
                os.fsync(index.fileno())
                writer.sync()
                self._journal.add(done, {REC: writer.offset, IDX: index.tell()}, left_out)
                left_out.clear()

            records = SetWriter(writer, index, num_classes, counts)
            for row, (label, image) in enumerate(zip(labels[start:].tolist(), images, strict=True), start):
                if isinstance(image, DataError):
                    on_bad(image)
                    left_out.append(row)
                else:
                    records.write(label, image)
                if (row + 1) % STEP == 0:
                    step(row + 1)
            if not records.count:
                raise DataError(f"{self.out}: no image to pack: all {len(labels)} were left out")
            if self.done < len(labels):
                step(len(labels))
            records.write_headers()

    def appear(self) -> None:
        """Let the files appear, the index last; nothing else stays."""
        if not self.finished:
            sizes = {}
            for name in self._names:
                with self.path(name).open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[name] = file.seek(0, os.SEEK_END)
            self._journal.add(self.done, sizes, [], finished=True)
        if self.path(self._names[-1]).exists():
            (self.out / self._names[-1]).unlink(missing_ok=True)  # never beside files of another set
        for name in self._others:
            (self.out / name).unlink(missing_ok=True)  # of the set that was replaced
        for name in self._names:
            if self.path(name).exists():
                self.path(name).replace(self.out / name)
        synced(self.out)
        self._clear()
        self._journal_path.unlink()
        self._over = True

    def _place(self, name: str) -> Path:
        return self.path(name) if self.path(name).exists() else self.out / name

    def _refuse_existing(self) -> None:
        refuse_existing(self.out, (*self._names, *self._others), force=self._force)

    def _remove_made(self) -> None:
        """Folders that were made for nothing, unless somebody wrote into them."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _clear(self) -> None:
        for name in (*self._names, *self._others):
            self.path(name).unlink(missing_ok=True)
            for left in self.out.glob(f".{self.path(name).name}.*.part"):  # of a kill within `appearing`
                left.unlink()
        if self._spill.exists():
            shutil.rmtree(self._spill)


class _Continued(RecordWriter):
    """Goes on behind the bytes that are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")
        self.offset = self._file.tell()

    def sync(self) -> None:
        """Until all is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _locked(path: Path) -> BinaryIO:
    """Open and lock a file, which may be removed or made meanwhile by whoever held the lock."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{path.parent}: another process packs into this folder: wait for it, or name another folder"
            ) from None
        file.close()


def _cannot_write(error: OSError, out: Path) -> DataError:
    return DataError(f"{error.filename or out}: cannot write it ({error.strerror})")
