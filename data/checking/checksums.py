"""Hashes of a set's files beside them: the format has none, and damage within a JPEG may decode.

`hashes.json` holds for each file its size, the SHA-256 of the whole, as sha256sum prints it, and of each block of 64
MiB: so damage is told by place, and only as much need be copied again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import appearing
from data.loading.prefetch import prefetch
from data.rec.places import Folder, index_of, record_files

NAME = "hashes.json"
BLOCK = 1 << 26
_MOST_THREADS = 4
"""The whole file's hash is made by one thread: more would wait for it, with a block each."""
_MOST_BLOCK = 1 << 30  # as much is held for each thread
_VERSION = 1
_FILES = ("property", "identities.txt", "labels.csv")
_SUFFIXES = (".bin",)
Progress = Callable[[int], None]
"""Called with the number of bytes just read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is not as the hashes say. begin, end: bytes, where only a part of the file is."""

    file: str
    what: str
    begin: int | None = None
    end: int | None = None

    def line(self) -> str:
        where = "" if self.begin is None else f" bytes {self.begin} … {self.end}:"
        return f"{self.file}:{where} {self.what}"


def files_of(folder: Path) -> list[Path]:
    """Files of a set that are hashed, sorted by name: all its record files and their indexes among them.

    Raises DataError when there is none.
    """
    records = _record_files(folder)
    names = {*records, *map(index_of, records), *_FILES}
    found = [folder / name for name in sorted(Folder(folder).names) if name in names or Path(name).suffix in _SUFFIXES]
    if not found:
        raise DataError(f"{folder}: expected a set, found no .rec, no .bin and none of {', '.join(_FILES)}")
    return found


def _record_files(folder: Path) -> list[str]:
    """Of the set, if there is one: a folder of verification sets has none."""
    with contextlib.suppress(DataError):
        return record_files(Folder(folder))
    return []


def write_hashes(folder: Path, *, threads: int, progress: Progress) -> dict[str, Any]:
    """Hash a set's files into `hashes.json` beside them; its content. Raises DataError."""
    files = {path.name: _hash(path, BLOCK, threads, progress) for path in files_of(folder)}
    content = {"version": _VERSION, "algorithm": "sha256", "block": BLOCK, "files": files}
    with appearing([folder / NAME]) as (partial,):
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    return content


def check_hashes(folder: Path, *, threads: int, progress: Progress) -> list[Fault]:
    """What differs from `hashes.json`; empty: nothing. Raises DataError when that file is missing or damaged."""
    hashes = Hashes(folder)
    faults = [fault for name in hashes.names for fault in hashes.check(name, threads=threads, progress=progress)]
    return faults + hashes.unnamed()


class Hashes:
    """What `hashes.json` says of a set's files, to be compared with them. names: of these files."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when that file is missing or damaged."""
        self.folder = folder
        self._content = _read(folder / NAME)
        self.names: list[str] = list(self._content["files"])
        self.block: int = self._content["block"]

    def unnamed(self) -> list[Fault]:
        """Record files of the set that `hashes.json` does not name."""
        what = f"expected its hash in {NAME}, found none: write it anew with `python -m data hash {self.folder}`"
        return [Fault(file=name, what=what) for name in _record_files(self.folder) if name not in self.names]

    def check(self, name: str, *, threads: int, progress: Progress) -> list[Fault]:
        """What differs in one file, which is read. Raises DataError where `hashes.json` contradicts itself."""
        path = self.folder / name
        if not path.is_file():
            return [Fault(file=name, what="missing")]
        return self.compare(name, _hash(path, self.block, threads, progress))

    def compare(self, name: str, found: dict[str, Any]) -> list[Fault]:
        """What differs in one file, by its size and hashes. Raises DataError where `hashes.json` contradicts itself."""
        expected, faults = self._content["files"][name], []
        if found["size"] != expected["size"]:
            faults.append(Fault(file=name, what=f"expected {expected['size']} bytes, found {found['size']}"))
        pairs = zip(expected["blocks"], found["blocks"], strict=False)
        changed = [n * self.block for n, (old, new) in enumerate(pairs) if old != new]
        faults += [
            Fault(file=name, what="changed", begin=begin, end=min(begin + self.block, found["size"]))
            for begin in changed
        ]
        same = found["sha256"] == expected["sha256"]
        if found["size"] == expected["size"] and same != (found["blocks"] == expected["blocks"]):
            raise DataError(
                f"{self.folder / NAME}: hash and block hashes of {name} contradict each other: write it anew"
            )
        return faults


class Hasher:
    """Hashes of a file that another reads from front to back: each block right before it does, so that the disk gives
    it once.
    """

    def __init__(self, view: memoryview, block: int) -> None:
        self._view = view
        self._block = block
        self._whole = hashlib.sha256()
        self._digests: list[str] = []

    def reach(self, offset: int) -> None:
        """Hash the blocks up to the one that holds the byte at `offset`."""
        while (begin := len(self._digests) * self._block) <= min(offset, len(self._view) - 1):
            with self._view[begin : begin + self._block] as part:
                self._whole.update(part)
                self._digests.append(hashlib.sha256(part).hexdigest())

    def finish(self) -> dict[str, Any]:
        """Hash what is left: size, hash, and hashes of the blocks."""
        self.reach(len(self._view))
        return {"size": len(self._view), "sha256": self._whole.hexdigest(), "blocks": self._digests}


@dataclass(slots=True)
class _Block:
    data: bytes
    digest: str = ""


def _hash(path: Path, block: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Blocks by threads ahead, as hashing runs outside of Python's lock."""
    whole, size, digests = hashlib.sha256(), 0, []

    def digest(one: _Block, _: range) -> None:
        one.digest = hashlib.sha256(one.data).hexdigest()

    threads = min(threads, _MOST_THREADS)
    try:
        with path.open("rb") as file:
            blocks = (_Block(data) for data in iter(lambda: file.read(block), b""))
            for one in prefetch(blocks, digest, rows=1, threads=threads, ahead=threads):
                whole.update(one.data)
                size += len(one.data)
                digests.append(one.digest)
                progress(len(one.data))
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    return {"size": size, "sha256": whole.hexdigest(), "blocks": digests}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        fine = content["version"] == _VERSION and content["algorithm"] == "sha256" and isinstance(content["block"], int)
        fine &= (
            0 < content["block"] <= _MOST_BLOCK
            and len(files) > 0
            and all(_is_entry(name, entry) for name, entry in files.items())
        )
    except FileNotFoundError:
        raise DataError(f"{path}: missing: write it with `python -m data hash {path.parent}`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise DataError(f"{path}: expected what `python -m data hash` writes, found something else: write it anew")
    checked: dict[str, Any] = content
    return checked


def _is_entry(name: str, entry: Any) -> bool:
    """A plain file name, no path that leads elsewhere; and numbers and texts where they should be."""
    plain = Path(name).name == name and name not in ("", ".", "..")
    return (
        plain
        and isinstance(entry["size"], int)
        and isinstance(entry["sha256"], str)
        and all(isinstance(text, str) for text in entry["blocks"])
    )
