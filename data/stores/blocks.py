"""A far file read in blocks that are kept on a local disk, by all processes of a host together.

Blocks are files of their own, which appear whole or not at all; the ones that nobody has used for the longest time
go when there is no more room. So any number of ranks may share a folder, come and go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.stores.block_disk import BlockDisk, locked

BLOCK = 1 << 22
"""Bytes: some 500 images."""
_LOCKS = 64
_TRIES = 4
_PAUSE_S = 0.5
"""Before the second try; twice as long before each further one."""
_log = logging.getLogger(__name__)

Fetch = Callable[[int, int], bytes]
"""Bytes begin … end of the far file. Raises OSError."""


class Blocks:
    """Bytes of one far file. Safe to share between threads."""

    def __init__(self, name: str, size: int, fetch: Fetch, *, folder: Path, disk: BlockDisk) -> None:
        """name: for messages. fetch: gets bytes, called by several threads. folder: for the blocks of this file only,
        within the disk's root. Raises DataError when it cannot be made.
        """
        self._name, self._size, self._fetch, self._folder, self._disk = name, size, fetch, folder, disk
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep blocks there ({error.strerror}): choose another cache") from None
        self._there: set[int] = set()
        """Blocks that were seen on the disk: they may be gone since."""
        self._coming: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._warned = False

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes begin … end. Raises DataError when they cannot be got."""
        first, last = begin // BLOCK, max(begin, end - 1) // BLOCK
        if first == last:
            return memoryview(self._part(first, begin, end))
        edges = [begin, *(number * BLOCK for number in range(first + 1, last + 1)), end]
        parts = [self._part(first + n, edges[n], edges[n + 1]) for n in range(len(edges) - 1)]
        return memoryview(b"".join(parts))

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begin to get the blocks that are not on the disk, and wait for none."""
        for number in numbers:
            if number in self._there:
                continue
            with self._lock:
                if number not in self._coming and not self.has(number):
                    self._coming[number] = self._disk.submit(partial(self._arrive, number))

    def has(self, number: int) -> bool:
        """Whether a block is on the disk."""
        if number not in self._there and self._path(number).exists():
            self._there.add(number)
        return number in self._there

    def close(self) -> None:
        """Forget what has been announced."""
        with self._lock:
            for coming in self._coming.values():
                coming.cancel()
            self._coming.clear()

    def _part(self, number: int, begin: int, end: int) -> bytes:
        """Bytes of one block."""
        at, path = begin - number * BLOCK, self._path(number)
        if (found := self._disk.read(path, at, end - begin)) is not None:
            return found
        self._there.discard(number)
        with self._lock:
            coming = self._coming.get(number)
            if coming is not None and coming.cancel():  # it waits in the queue: others' turn is not ours
                del self._coming[number]
                coming = None
        if coming is not None:
            with contextlib.suppress(DataError):
                coming.result()
            if (found := self._disk.read(path, at, end - begin)) is not None:
                return found
        whole = self._load(number)
        found = self._disk.read(path, at, end - begin) if whole is None else whole[at : at + end - begin]
        return self._get(number)[at : at + end - begin] if found is None else found

    def _arrive(self, number: int) -> None:
        try:
            self._load(number)
        finally:
            with self._lock:
                self._coming.pop(number, None)

    def _load(self, number: int) -> bytes | None:
        """Bring a block to the disk; the block itself, unless another process has been faster."""
        path, begin = self._path(number), number * BLOCK
        data = None
        try:
            with locked(self._folder / f".lock_{number % _LOCKS}"):
                if path.exists() and path.stat().st_size == self._end(number) - begin:
                    self._there.add(number)
                    return None
                data = self._get(number)
                unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
                unfinished.write_bytes(data)
                unfinished.replace(path)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("%s: cannot keep blocks there (%s): they are got anew each time", self._folder, error)
            return self._get(number) if data is None else data
        self._there.add(number)
        self._disk.wrote(len(data))
        return data

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _end(self, number: int) -> int:
        return min(self._size, (number + 1) * BLOCK)

    def _get(self, number: int) -> bytes:
        return get(self._name, self._fetch, number * BLOCK, self._end(number))


def get(name: str, fetch: Fetch, begin: int, end: int) -> bytes:
    """Bytes begin … end, tried again after a failure. Raises DataError in the end."""
    for attempt in range(_TRIES):
        try:
            data = fetch(begin, end)
        except DataError:
            raise
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
