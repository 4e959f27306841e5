"""A far file read in blocks that are kept on a local disk, by all processes of a host together.

Blocks are files of their own, which appear whole or not at all; the ones that nobody has used for the longest time
go when there is no more room. So any number of ranks may share a folder, come and go.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data.errors import DataError

BLOCK = 1 << 22
"""Bytes: some 500 images, which an object store sends in about the time that it takes to answer at all."""
_THREADS = 16
_MOST_OPEN = 256
_LOCKS = 64
_TRIES = 4
_PAUSE_S = 0.5
"""Before the second try; twice as long before each further one."""
_TRIM_EVERY = 32
_TRIM_TO = 0.9
_log = logging.getLogger(__name__)

Fetch = Callable[[int, int], bytes]
"""Bytes begin … end of the far file. Raises OSError."""


class Blocks:
    """Bytes of one far file.

    name: for messages. fetch: gets them, called by several threads. folder: for the blocks of this file only, within
    `root`, whose blocks are trimmed to `limit` bytes together. Safe to share between threads.
    """

    def __init__(self, name: str, size: int, fetch: Fetch, *, folder: Path, root: Path, limit: int) -> None:
        """Raises DataError when the folder cannot be made."""
        self._name, self._size, self._fetch = name, size, fetch
        self._folder, self._root, self._limit = folder, root, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep blocks there ({error.strerror}): choose another cache") from None
        self._open: OrderedDict[int, memoryview] = OrderedDict()
        self._coming: dict[int, Future[memoryview]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="blocks")
        self._written, self._warned = 0, False

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes begin … end: a view, or a copy where they lie in several blocks. Raises DataError."""
        first, last = begin // BLOCK, max(begin, end - 1) // BLOCK
        if first == last:
            return self._block(first)[begin - first * BLOCK : end - first * BLOCK]
        parts = [self._block(number) for number in range(first, last + 1)]
        parts[-1] = parts[-1][: end - last * BLOCK]
        parts[0] = parts[0][begin - first * BLOCK :]
        return memoryview(b"".join(parts))

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begin to get these blocks, and wait for none."""
        for number in numbers:
            with self._lock:
                if number not in self._open and number not in self._coming:
                    self._coming[number] = self._pool.submit(self._arrive, number)

    def close(self) -> None:
        """Wait for what is on its way, and unmap all blocks."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._coming.clear()
            self._open.clear()

    def _block(self, number: int) -> memoryview:
        with self._lock:
            if (view := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return view
            coming = self._coming.get(number)
            if coming is not None and coming.cancel():  # it waits in the queue: others' turn is not ours
                del self._coming[number]
                coming = None
        return self._arrive(number) if coming is None else coming.result()

    def _arrive(self, number: int) -> memoryview:
        try:
            view = self._load(number)
            with self._lock:
                self._open[number] = view
                while len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            return view
        finally:
            with self._lock:
                self._coming.pop(number, None)

    def _load(self, number: int) -> memoryview:
        path = self._folder / f"{number:08d}"
        if (view := self._mapped(path, number)) is not None:
            return view
        try:
            with _locked(self._folder / f".lock_{number % _LOCKS}"):
                if (view := self._mapped(path, number)) is not None:  # another process was faster
                    return view
                data = self._get(number)
                partial = path.with_name(f".{path.name}.{os.getpid()}.part")
                partial.write_bytes(data)
                partial.replace(path)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("%s: cannot keep blocks there (%s): they are got anew each time", self._folder, error)
            return memoryview(self._get(number))
        self._trim()
        return memoryview(data) if (view := self._mapped(path, number)) is None else view

    def _mapped(self, path: Path, number: int) -> memoryview | None:
        """None: the block is not there, or not whole."""
        try:
            with path.open("rb") as file:
                os.utime(file.fileno())
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # an empty file cannot be mapped
            return None
        return view if len(view) == self._end(number) - number * BLOCK else None

    def _end(self, number: int) -> int:
        return min(self._size, (number + 1) * BLOCK)

    def _get(self, number: int) -> bytes:
        return get(self._name, self._fetch, number * BLOCK, self._end(number))

    def _trim(self) -> None:
        """Remove the blocks that nobody has opened for the longest time, of all files in the root."""
        with self._lock:
            self._written += 1
            if self._written % _TRIM_EVERY != 1:
                return
        with contextlib.suppress(OSError), _locked(self._root / ".trim"):
            blocks = sorted(
                (status.st_mtime, status.st_size, path)
                for path in self._root.glob("*/[0-9]*")
                if (status := _status(path)) is not None
            )
            total = sum(size for _, size, _ in blocks)
            if total <= self._limit:
                return
            for _, size, path in blocks:
                path.unlink(missing_ok=True)
                total -= size
                if total <= self._limit * _TRIM_TO:
                    return


def get(name: str, fetch: Fetch, begin: int, end: int) -> bytes:
    """Bytes begin … end, tried again after a failure. Raises DataError in the end."""
    for attempt in range(_TRIES):
        try:
            data = fetch(begin, end)
        except Exception as error:  # whatever a store's library raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if len(data) == end - begin:
                return data
            reason = f"it sent {len(data)} bytes"
        if attempt < _TRIES - 1:
            _log.info("%s: bytes %d … %d did not come (%s): tried again", name, begin, end, reason)
            time.sleep(_PAUSE_S * 2**attempt)
    raise DataError(
        f"{name}: bytes {begin} … {end} did not come in {_TRIES} tries, the last time as {reason}: see whether the "
        "store can be reached and the file is as it was"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
