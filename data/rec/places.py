"""Where a set lies: in a folder, or in an object store; and which record files it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from configs.addresses import holds_credentials, where_credentials_belong
from data.errors import DataError
from data.rec.recordio import RecordReader, Records, Where
from data.stores.cache import Cache
from data.stores.remote import Store

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(://|::)")
_LOCAL = ("file://", "local://")


def where(text: str) -> Where:
    """Reads a path or an address: one of a local file is a path."""
    for local in _LOCAL:
        text = text.removeprefix(local)
    return text if is_address(text) else Path(text)


class Place(Protocol):
    """address: for messages."""

    address: str

    @property
    def names(self) -> list[str]:
        """Files that are there."""

    def mark(self, name: str) -> list[str]:
        """What changes when the file of that name does."""

    def local(self, name: str) -> Path:
        """The file, or a local copy of it; there need not be any."""

    def records(self, name: str) -> Records:
        """A record file, opened."""

    def close(self) -> None:
        """Let go of what all of its record files share."""


class Folder:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.address, self._folder = str(folder), folder

    @property
    def names(self) -> list[str]:
        try:
            return [path.name for path in self._folder.iterdir() if path.is_file()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot read it ({error.strerror}): expected a folder with train.rec and property"
            ) from None

    def mark(self, name: str) -> list[str]:
        """See `Place`."""
        path = (self._folder / name).resolve()
        status = path.stat()
        return [str(path), str(status.st_size), str(status.st_mtime_ns)]

    def local(self, name: str) -> Path:
        """See `Place`."""
        return self._folder / name

    def records(self, name: str) -> Records:
        """See `Place`."""
        return RecordReader(self._folder / name)

    def close(self) -> None:
        """See `Place`: nothing."""


def is_address(where: Where) -> bool:
    """Whether it is of an object store rather than a path."""
    return isinstance(where, str) and _ADDRESS.match(where) is not None and not where.startswith(_LOCAL)


def place_of(where: Where, cache: Cache) -> Place:
    """The place that a path or an address names. Raises DataError, also for an address with credentials in it."""
    _refuse_credentials(where)
    return Store(str(where), cache) if is_address(where) else Folder(Path(where))


def local_file(where: Where, cache: Cache) -> Path:
    """A file by its path, or a local copy of it by its address. Raises DataError."""
    if not is_address(where):
        return Path(where)
    _refuse_credentials(where)
    folder, _, name = str(where).rpartition("/")
    return Store(folder, cache).local(name)


def _refuse_credentials(where: Where) -> None:
    """Before anything names the address: messages, logs and the cache would all hold them."""
    if is_address(where) and holds_credentials(str(where)):
        raise DataError(where_credentials_belong("the address"))


def record_files(place: Place) -> list[str]:
    """train.rec; or else train*.rec; or else all *.rec: one set together, 2 before 10. Raises DataError."""
    names = place.names
    if "train.rec" in names:
        return ["train.rec"]
    all_of_them = [name for name in names if name.endswith(".rec") and not name.startswith(".")]
    found = [name for name in all_of_them if name.startswith("train")] or all_of_them
    if not found:
        raise DataError(f"{place.address}/train.rec: missing: expected a folder with train.rec, train.idx and property")
    return sorted(found, key=natural)


def index_of(name: str) -> str:
    """Name of the index beside a record file."""
    return f"{name.removesuffix('.rec')}.idx"


def natural(name: str) -> list[tuple[int, str]]:
    """To sort names by: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)  # every second one is digits
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]
