"""What all blocks of far files share on a host: room on a disk, open files, and the threads that get them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

_THREADS = 16
_MOST_OPEN = 512
_FRESH_S = 60.0
"""So much older than its last use may a block look."""
_TRIM_AFTER, _TRIM_TO = 0.02, 0.9
"""Shares of the limit: what is written between two looks at all blocks; what may stay when it is passed."""
_ABANDONED_S = 3600.0


class BlockDisk:
    """A folder whose subfolders hold blocks, `limit` bytes of them. Safe to share between threads and processes."""

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self._limit = root, limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._most = max(16, min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._threads = 0

    def read(self, path: Path, offset: int, size: int) -> bytes | None:
        """Bytes of a block; None when it is not there, or too short."""
        with self._lock:
            descriptor = self._open.pop(path, None)  # nobody closes it meanwhile
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                if time.time() - os.fstat(descriptor).st_mtime > _FRESH_S:
                    os.utime(descriptor)
            except OSError:
                return None
        data = os.pread(descriptor, size, offset)
        closing = [descriptor]
        with self._lock:
            if path not in self._open and len(data) == size:
                self._open[path] = closing.pop()
            if len(self._open) > self._most:
                closing.append(self._open.popitem(last=False)[1])
        for each in closing:
            os.close(each)
        return data if len(data) == size else None

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Have a thread do it. The threads end with the process, whatever is left to do."""
        future: Future[None] = Future()
        self._tasks.put((future, work))
        with self._lock:
            if self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="blocks", daemon=True).start()
        return future

    def close(self) -> None:
        """Close all files, and end the threads when they have done what was not cancelled."""
        with self._lock:
            descriptors = list(self._open.values())
            self._open.clear()
            for _ in range(self._threads):
                self._tasks.put(None)
            self._threads = 0
        for descriptor in descriptors:
            os.close(descriptor)

    def wrote(self, size: int) -> None:
        """Count what was written; now and then remove the blocks that nobody has used for the longest time."""
        with contextlib.suppress(OSError), locked(self._root / ".written") as count:
            written = int.from_bytes(os.pread(count, 8, 0), "little") + size
            look = written > self._limit * _TRIM_AFTER
            os.pwrite(count, (0 if look else written).to_bytes(8, "little"), 0)
            if look:
                self._trim()

    def _trim(self) -> None:
        for partial in self._root.glob("*/.[0-9]*.part"):  # of a process that was killed
            if (status := _status(partial)) is not None and time.time() - status.st_mtime > _ABANDONED_S:
                partial.unlink(missing_ok=True)
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

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if future.set_running_or_notify_cancel():
                try:
                    work()
                    future.set_result(None)
                except BaseException as error:
                    future.set_exception(error)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock among processes and threads: the descriptor of its file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
