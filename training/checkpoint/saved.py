"""A checkpoint that is read: any rows of any tensor, whatever ranks wrote them, each block checked by its hash."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.checkpoint.errors import CheckpointError, DamagedError
from training.checkpoint.manifest import BLOCK, DTYPES, MOST_BYTES, NAME, Entry, Manifest, parse
from training.checkpoint.places import Place

T = TypeVar("T")
_PAUSES_S = (0.5, 2.0)
"""Between tries to read what a file system or store does not give."""
_KEPT = 8
"""Blocks kept for the next tensor, which begins where the last one ended."""
_THREADS = 4


class Saved:
    """One checkpoint of a place. No method runs a collective."""

    def __init__(self, place: Place, folder: str) -> None:
        """Reads the manifest, and looks whether every part is there in full length.

        Raises DamagedError, and CheckpointError when it cannot be read at all.
        """
        self.place, self.folder = place, folder
        self.address = f"{place.address}/{folder}"
        self.each: Callable[[], None] = _nothing
        """Called for every block that is read, by any thread: reading goes on."""
        sizes = self._again(lambda: place.files(folder), self.address)
        told = self._manifest(sizes)
        self.manifest: Manifest = parse(f"{self.address}/{NAME}", told)
        self.mark = int.from_bytes(hashlib.sha256(told).digest()[:6], "big")
        """Of the manifest: two that agree in it are the same checkpoint."""
        for name, part in self.manifest.parts.items():
            if name not in sizes:
                raise DamagedError(f"{self.address}: not whole, {name} is missing")
            if sizes[name] != part.size:
                raise DamagedError(f"{self.address}/{name}: expected {part.size} bytes, found {sizes[name]}")
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def _manifest(self, sizes: dict[str, int]) -> bytes:
        if NAME not in sizes:
            raise DamagedError(f"{self.address}: not whole, {NAME} is missing")
        name = f"{self.folder}/{NAME}"
        return self._again(lambda: self.place.read(name, 0, MOST_BYTES + 1), f"{self.address}/{NAME}")

    def _again(self, read: Callable[[], T], where: str) -> T:
        """What `read` gives; a file system or store may need some tries. One that is not there is damage."""
        for pause in (*_PAUSES_S, None):
            try:
                return read()
            except FileNotFoundError:
                raise DamagedError(f"{where}: missing") from None
            except OSError as error:
                if pause is None:
                    raise CheckpointError(f"{where}: cannot read it ({error.strerror or error})") from None
                time.sleep(pause)
        raise AssertionError

    @property
    def values(self) -> dict[str, Any]:
        return self.manifest.values

    @property
    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises DamagedError where there is none of that name."""
        return self._entry(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, all without them; a scalar as it is. On the CPU, (stop - start, …).

        Raises DamagedError when they are not there, or a block that holds some of them is not what was written.
        """
        entry = self._entry(name)
        stop = entry.rows if stop is None else stop
        if not 0 <= start <= stop <= entry.rows:
            raise DamagedError(f"{self.address}: {name}: expected rows {start} to {stop}, found {entry.rows}")
        found = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        if found.numel():
            into = found.view(-1).view(torch.uint8).numpy().data
            for piece in entry.pieces:
                first, last = max(start, piece.start), min(stop, piece.start + piece.rows)
                if first < last:
                    at = piece.offset + (first - piece.start) * entry.row_bytes
                    self._fill(
                        piece.file, at, into[(first - start) * entry.row_bytes : (last - start) * entry.row_bytes]
                    )
        return found if entry.shape else found[0]

    def named(self, prefix: str, *, leave: str = "") -> dict[str, Tensor]:
        """Whole tensors whose names begin so, by what follows; without `leave`."""
        names = (name for name in self.names if name.startswith(prefix) and name != leave)
        return {name.removeprefix(prefix): self.read(name) for name in names}

    def block(self, part: str, block: int) -> bytes:
        """A block of a part. Raises DamagedError unless it is what was written."""
        key = (part, block)
        if (kept := self._kept.get(key)) is not None:
            return kept
        content = bytearray(min(BLOCK, self.manifest.parts[part].size - block * BLOCK))
        self._read(part, block, memoryview(content))
        self._kept[key] = bytes(content)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _read(self, part: str, block: int, into: memoryview) -> None:
        where = f"{self.address}/{part}"
        size = self._again(lambda: self.place.read_into(f"{self.folder}/{part}", block * BLOCK, into), where)
        self.each()
        if size != len(into) or hashlib.sha256(into).hexdigest() != self.manifest.parts[part].blocks[block]:
            first = block * BLOCK
            raise DamagedError(f"{where}: bytes {first} to {first + len(into) - 1} are not what was written")

    def _entry(self, name: str) -> Entry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise DamagedError(f"{self.address}: not a checkpoint of this program, {name!r} is not in it")
        return entry

    def _fill(self, part: str, begin: int, into: memoryview) -> None:
        end = begin + len(into)
        blocks = range(begin // BLOCK, -(-end // BLOCK))

        def one(block: int) -> None:
            first = block * BLOCK
            last = min(first + BLOCK, self.manifest.parts[part].size)
            if begin <= first and last <= end:
                self._read(part, block, into[first - begin : last - begin])
                return
            content = self.block(part, block)
            low, high = max(begin, first), min(end, last)
            into[low - begin : high - begin] = content[low - first : high - first]

        _all_of(one, blocks)


def _nothing() -> None:
    pass


def _all_of(work: Any, items: Sequence[int]) -> None:
    if len(items) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(_THREADS) as pool:  # reading and hashing let go of the interpreter
        for _ in pool.map(work, items):
            pass
