"""A folder of an object store, read through fsspec."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import fsspec

from configs.extras import driver_for
from data.errors import DataError
from data.files import appearing
from data.stores.block_disk import BlockDisk, locked
from data.stores.blocks import Blocks
from data.stores.cache import Cache, keep_only, stamp
from data.stores.remote_records import RemoteRecords, pieces

_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "created")
"""Any of these changes with a file, by store."""
_LOOK_AGAIN = 256
"""Answers of the store after which it is asked whether a file is still the same."""
_log = logging.getLogger(__name__)


class Store:
    """A folder of an object store: `s3://bucket/folder`, or any address that fsspec knows.

    address: without a slash at its end. Credentials and endpoints are fsspec's and its drivers' matter: environment
    variables and configuration files.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        """Lists the folder. Raises DataError, also when the driver of such addresses is not installed."""
        self.address, self._cache = address.rstrip("/"), cache
        try:
            self._fs, base = fsspec.url_to_fs(self.address)
            self._base = base.rstrip("/")
            self._fs.invalidate_cache()
            listed = self._fs.ls(self._base, detail=True)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{address}: expected a driver for such addresses ({error}): {driver_for(address)}"
            ) from None
        except FileNotFoundError:
            raise DataError(f"{address}: nothing is there: expected a folder with train.rec and property") from None
        except Exception as error:  # whatever a store's library raises
            raise DataError(
                f"{address}: cannot list it ({_said(error)}): see address, endpoint and credentials"
            ) from None
        self._facts: dict[str, Any] = {
            info["name"].rstrip("/").rpartition("/")[2]: info for info in listed if info["type"] == "file"
        }
        self._disk = BlockDisk(cache.folder / "blocks", cache.limit)
        self._answers = itertools.count(1)

    @property
    def names(self) -> list[str]:
        """Files of the folder itself."""
        return list(self._facts)

    def mark(self, name: str) -> list[str]:
        """What changes when the file does."""
        found = self._mark_in(self._info(name))
        if not found:
            _log.warning("%s/%s: the store does not say when it changes: its size has to do", self.address, name)
        return [f"{self.address}/{name}", str(self.size(name)), *found]

    def size(self, name: str) -> int:
        """Bytes of a file. Raises DataError when there is none, or the store does not say."""
        size = self._info(name)["size"]
        if size is None:
            raise DataError(f"{self.address}/{name}: the store does not say how large it is: copy the set from there")
        return int(size)

    def local(self, name: str) -> Path:
        """A copy of a file on the local disk, got once. name: may lead into a subfolder. Raises DataError."""
        of_address = self._cache.folder / "files" / stamp(f"{self.address}/{name}")
        folder = of_address / stamp(self.mark(name))
        path = folder / name.rpartition("/")[2]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(of_address / ".lock"):
                if not path.is_file():
                    with appearing([path]) as (partial,):
                        self._download(name, partial)
                    keep_only(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep {name} there ({error.strerror}): choose another cache") from None
        return path

    def records(self, name: str) -> RemoteRecords:
        """A record file."""
        address = f"{self.address}/{name}"
        folder = self._cache.folder / "blocks" / stamp(self.mark(name))

        def fetch(begin: int, end: int) -> bytes:
            return self.fetch(name, begin, end)

        blocks = Blocks(address, self.size(name), fetch, folder=folder, disk=self._disk)
        return RemoteRecords(address, self.size(name), fetch, blocks)

    def fetch(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a file. Raises DataError when it has changed, and whatever the store's library raises."""
        if next(self._answers) % _LOOK_AGAIN == 0:
            now = self._fs.info(f"{self._base}/{name}", **self._anew())
            if (now["size"], self._mark_in(now)) != (self._info(name)["size"], self._mark_in(self._info(name))):
                raise DataError(f"{self.address}/{name}: it was changed while it was read: start again")
        data: bytes = self._fs.cat_file(f"{self._base}/{name}", start=begin, end=end)
        return data

    def close(self) -> None:
        """Close the files of blocks, and end the threads that get them."""
        self._disk.close()

    def _anew(self) -> dict[str, bool]:
        return {"refresh": True} if "s3" in self._fs.protocol else {}

    def _info(self, name: str) -> dict[str, Any]:
        if name not in self._facts or self._facts[name]["size"] is None:
            try:
                self._facts[name] = self._fs.info(f"{self._base}/{name}")
            except FileNotFoundError:
                raise DataError(f"{self.address}/{name}: missing") from None
            except Exception as error:  # whatever a store's library raises
                raise DataError(f"{self.address}/{name}: cannot ask for it ({_said(error)})") from None
        facts: dict[str, Any] = self._facts[name]
        return facts

    @staticmethod
    def _mark_in(info: dict[str, Any]) -> list[str]:
        return [str(info[mark]) for mark in _MARKS if mark in info][:1]

    def _download(self, name: str, to: Path) -> None:
        def fetch(begin: int, end: int) -> bytes:
            return self.fetch(name, begin, end)

        with to.open("wb") as file:
            for piece in pieces(f"{self.address}/{name}", self.size(name), fetch):
                file.write(piece)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
