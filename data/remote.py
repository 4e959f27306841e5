"""Record files and what lies beside them in an object store, read through fsspec by ranges of bytes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from data.blocks import BLOCK, Blocks, get
from data.cache import Cache, stamp
from data.errors import DataError
from data.files import appearing
from data.prefetch import prefetch
from data.recordio import Records

_GAP = 1 << 16
"""Bytes between two headers that are rather read than asked for twice."""
_SPAN = 1 << 23
_SPANS = 16
"""Asked for at a time."""
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "created")
"""Any of these changes with a file, by store."""


class Store:
    """A folder of an object store: `s3://bucket/folder`, or any address that fsspec knows.

    address: without a slash at its end. names: of its files. Credentials and endpoints are fsspec's and its drivers'
    matter: environment variables and configuration files.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        """Lists the folder. Raises DataError, also when the driver of such addresses is not installed."""
        self.address, self._cache = address.rstrip("/"), cache
        try:
            self._fs, self._base = fsspec.url_to_fs(self.address)
            self._fs.invalidate_cache(self._base)
            listed = self._fs.ls(self._base, detail=True)
        except ImportError as error:
            raise DataError(f"{address}: expected a driver for it ({error}): for s3, install clusterface[s3]") from None
        except FileNotFoundError:
            raise DataError(f"{address}: nothing is there: expected a folder with train.rec and property") from None
        except Exception as error:  # whatever a store's library raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{address}: cannot list it ({reason}): see address, endpoint and credentials") from None
        self._facts: dict[str, Any] = {
            info["name"].rstrip("/").rpartition("/")[2]: info for info in listed if info["type"] == "file"
        }

    @property
    def names(self) -> list[str]:
        return list(self._facts)

    def mark(self, name: str) -> list[str]:
        """What changes when the file does."""
        facts = self._facts[name]
        changing = [str(facts[mark]) for mark in _MARKS if mark in facts]
        return [f"{self.address}/{name}", str(facts["size"]), *changing[:1]]

    def local(self, name: str) -> Path:
        """A copy of a file on the local disk, got once. Raises DataError."""
        if Path(name).is_absolute():
            return Path(name)
        if name not in self._facts:
            return Path(f"{self.address}/{name}")  # whoever opens it says that it is missing
        folder = self._cache.folder / "files" / stamp(self.mark(name))
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    with appearing([path]) as (partial,):
                        self._download(name, partial)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep {name} there ({error.strerror}): choose another cache") from None
        return path

    def records(self, name: str) -> RemoteRecords:
        """A record file."""
        return RemoteRecords(self, name)

    def fetch(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a file. Raises whatever the store's library raises."""
        data: bytes = self._fs.cat_file(f"{self._base.rstrip('/')}/{name}", start=begin, end=end)
        return data

    def blocks(self, name: str) -> Blocks:
        """A file in blocks."""
        root = self._cache.folder / "blocks"
        return Blocks(
            f"{self.address}/{name}",
            self.size(name),
            lambda begin, end: self.fetch(name, begin, end),
            folder=root / stamp(self.mark(name)),
            root=root,
            limit=self._cache.limit,
        )

    def size(self, name: str) -> int:
        return int(self._facts[name]["size"])

    def _download(self, name: str, to: Path) -> None:
        def fetch(begin: int, end: int) -> bytes:
            return self.fetch(name, begin, end)

        spans = (_Span(begin, min(begin + _SPAN, self.size(name))) for begin in range(0, self.size(name), _SPAN))

        def arrive(span: _Span, _: range) -> None:
            span.data = get(f"{self.address}/{name}", fetch, span.begin, span.end)

        with to.open("wb") as file:
            for span in prefetch(spans, arrive, rows=1, threads=_SPANS, ahead=_SPANS):
                file.write(span.data)


@dataclass(slots=True)
class _Span:
    begin: int
    end: int
    rows: slice | None = None
    """Of what it holds the headers of; None: it is a piece of a file."""
    data: bytes = b""


class RemoteRecords(Records):
    """A record file of a store: images through blocks, headers of many records by their ranges."""

    def __init__(self, store: Store, name: str) -> None:
        self.path = f"{store.address}/{name}"
        self.size = store.size(name)
        self._store, self._name = store, name
        self._blocks = store.blocks(name)

    def read(self, begin: int, end: int) -> memoryview:
        """See `Records`. Raises DataError when the store does not give the bytes."""
        return self._blocks.read(begin, end)

    def ahead(self, offsets: npt.NDArray[np.int64]) -> None:
        """See `Records`."""
        self._blocks.ahead(np.unique(offsets // BLOCK).tolist())

    def words(self, offsets: npt.NDArray[np.int64], places: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
        """See `Records`. Nothing of it is kept: blocks are for images."""
        reach = 4 * (max(places) + 1)
        found = [np.empty(len(offsets), np.uint32) for _ in places]

        def fetch(begin: int, end: int) -> bytes:
            return self._store.fetch(self._name, begin, end)

        def arrive(span: _Span, _: range) -> None:
            span.data = get(str(self.path), fetch, span.begin, span.end)

        for span in prefetch(self._spans(offsets, reach), arrive, rows=1, threads=_SPANS, ahead=_SPANS):
            words = np.frombuffer(span.data + bytes(reach + 4 - len(span.data) % 4), "<u4")
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
