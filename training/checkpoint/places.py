"""Where checkpoints lie: in a local folder, or in an object store that fsspec knows.

Nothing here relies on renaming folders, which object stores lack: parts come first, and the small file that names them
comes last and at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from configs.addresses import holds_credentials, where_credentials_belong
from configs.extras import driver_for
from data.files import synced
from data.rec.places import is_address
from training.checkpoint.errors import CheckpointError


class Place(Protocol):
    """Names are relative, with a slash between folder and file. All methods but `create` raise OSError."""

    address: str
    """For messages."""

    def folders(self) -> list[str]:
        """Folders in it; none where nothing is there yet."""

    def files(self, folder: str) -> dict[str, int]:
        """Names of the files of a folder, and their bytes; none where there is no such folder."""

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Some bytes of a file, fewer where it ends before. FileNotFoundError where there is none."""

    def read_into(self, name: str, begin: int, into: memoryview) -> int:
        """The same, to where it belongs: how many bytes there were."""

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file; it counts, and will outlive a loss of power, once the block has ended well."""

    def put(self, name: str, content: bytes) -> None:
        """A small file that is there in full or as it was before, whatever happens; to last."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is none."""


class Folder:
    """A local folder, or one on a file system that all hosts share."""

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def folders(self) -> list[str]:
        """See `Place`."""
        try:
            return [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
        except FileNotFoundError:
            return []

    def files(self, folder: str) -> dict[str, int]:
        """See `Place`."""
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.path / folder)}
        except FileNotFoundError:
            return {}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """See `Place`."""
        with (self.path / name).open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else end - begin)

    def read_into(self, name: str, begin: int, into: memoryview) -> int:
        """See `Place`."""
        with (self.path / name).open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(into) and (some := file.readinto(into[done:])):
                done += some
            return done

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """See `Place`."""
        path = self.path / name
        _make(path.parent)
        with path.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        synced(path.parent)

    def put(self, name: str, content: bytes) -> None:
        """See `Place`."""
        path = self.path / name
        _make(path.parent)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(content)
        synced(new)
        new.replace(path)
        synced(path.parent)

    def remove(self, name: str) -> None:
        """See `Place`."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """A folder whose name outlives a loss of power, and those above it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        synced(path.parent)


class ObjectStore:
    """A folder of an object store: `s3://bucket/run/checkpoints`, or any address that fsspec knows."""

    def __init__(self, address: str) -> None:
        """Raises CheckpointError when the driver of such addresses is not installed."""
        self.address = address.rstrip("/")
        try:
            self._fs, base = fsspec.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"{address}: expected a driver for such addresses ({error}): {driver_for(address)}"
            ) from None
        self._base = str(base).rstrip("/")

    def folders(self) -> list[str]:
        """See `Place`."""
        return list(self._listed("", "directory"))

    def files(self, folder: str) -> dict[str, int]:
        """See `Place`."""
        return self._listed(f"/{folder}", "file")

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """See `Place`."""
        with _as_os_error(name):
            content: bytes = self._fs.cat_file(f"{self._base}/{name}", start=begin or None, end=end)
            return content

    def read_into(self, name: str, begin: int, into: memoryview) -> int:
        """See `Place`."""
        content = self.read(name, begin, begin + len(into))
        into[: len(content)] = content
        return len(content)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """See `Place`."""
        with _as_os_error(name):
            self._fs.makedirs(f"{self._base}/{name}".rpartition("/")[0], exist_ok=True)
            with self._fs.open(f"{self._base}/{name}", "wb") as file:
                yield file

    def put(self, name: str, content: bytes) -> None:
        """See `Place`. Stores replace an object at once."""
        with _as_os_error(name):
            self._fs.pipe_file(f"{self._base}/{name}", content)

    def remove(self, name: str) -> None:
        """See `Place`."""
        with _as_os_error(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._base}/{name}", recursive=True)

    def _listed(self, folder: str, kind: str) -> dict[str, int]:
        with _as_os_error(folder):
            self._fs.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self._fs.ls(self._base + folder, detail=True)
            except FileNotFoundError:
                return {}
            return {
                info["name"].rstrip("/").rpartition("/")[2]: int(info["size"] or 0)
                for info in found
                if info["type"] == kind
            }


@contextlib.contextmanager
def _as_os_error(name: str) -> Iterator[None]:
    """Whatever a store's library raises, as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        words = (str(error) or "no message").splitlines()[0]
        raise OSError(0, f"{type(error).__name__}: {words}", name) from None


def place_of(where: str) -> Place:
    """The place that a path or an address names. Raises CheckpointError."""
    if holds_credentials(where):
        raise CheckpointError(where_credentials_belong("an address of checkpoints"))
    return ObjectStore(where) if is_address(where) else Folder(Path(where.removeprefix("file://")))
