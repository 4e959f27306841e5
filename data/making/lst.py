"""List files `*.lst`, which name image files and their labels, in the two orders of columns that are in use.

face2rec: `aligned<TAB>path<TAB>label`, numbers may follow. im2rec: `index<TAB>label<TAB>path`, more labels may stand
before the path. The first label is the class. A line is read on its own and at most 64 KiB of it, and a row stays as
three numbers, so the memory is that of the counts.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import check_same
from data.making.sources import encode_file

Ints = npt.NDArray[np.int64]
COLUMNS = {"face2rec": "aligned, path, label …", "im2rec": "index, label …, path"}
"""Orders of the columns by their names."""
_MOST_LINE = 1 << 16
_NUMBER = re.compile(rb"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_CLASS = re.compile(rb"0*([0-9]{1,18})(\.0*)?")
"""Whole, below 2^63; im2rec writes labels as `12.000000`."""


class Listed(NamedTuple):
    """rows (N, 3): line, and first byte and bytes of the path in the file; labels (N,)."""

    rows: Ints
    labels: Ints


def read_list(path: Path, columns: str | None) -> Listed:
    """Read a list; columns: a name of COLUMNS, or None to find out.

    Raises DataError with the line where it is not as expected, where a path is no relative one or leads upwards, or
    where both orders of the columns would fit every line.
    """
    order = columns or _find_order(path)
    rows, labels = array("q"), array("q")
    for number, begin, line in _lines(path):
        fields = line.split(b"\t")
        if found := _misfit(fields, order):
            raise _expected(path, number, COLUMNS[order], found)
        if order == "face2rec" and not int(fields[0]):
            raise DataError(
                f"{path}: line {number}: expected an aligned face (1 in the first column), found 0: align the images "
                "first, nothing does it here"
            )
        place = 1 if order == "face2rec" else len(fields) - 1
        _check_path(path, number, fields[place])
        rows.extend((number, begin + sum(len(field) + 1 for field in fields[:place]), len(fields[place])))
        labels.append(_class_of(path, number, fields[_label_place(order)]))
    if not labels:
        raise DataError(f"{path}: expected a line for each image, found none")
    return Listed(np.array(rows, np.int64).reshape(-1, 3), np.array(labels, np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class ListSource:
    """The images of a list: files below `root`, and nothing outside of it. identity: of the list file."""

    path: Path
    root: Path
    identity: Sequence[str]

    def encode(self, wanted: Ints) -> list[bytes | DataError]:
        """Of rows as `read_list` gives them. Raises DataError for another list, or a link that leads out of `root`."""
        self.check()
        root, folders = os.path.realpath(self.root), dict[str, str]()
        encoded = []
        try:
            with self.path.open("rb") as file:
                for number, begin, length in wanted.tolist():
                    file.seek(begin)
                    encoded.append(self._encode_one(number, file.read(length), root, folders))
        except OSError as error:
            raise DataError(f"{self.path}: cannot read it ({error.strerror})") from None
        return encoded

    def listing(self) -> Iterator[str]:
        yield str(self.root.absolute())
        yield from self.identity

    def check(self) -> None:
        check_same([self.path], self.identity)

    def _encode_one(self, number: int, name: bytes, root: str, folders: dict[str, str]) -> bytes | DataError:
        where = f"{self.path}: line {number}: {name.decode(errors='replace')!r:.300}"
        try:
            target = _resolved(name.decode(), root, folders)
        except (ValueError, OSError) as error:
            raise DataError(f"{where}: expected a path below {self.root} ({error})") from None
        if os.path.commonpath((root, target)) != root:
            raise DataError(f"{where}: expected a file below {self.root}, found a link out of it")
        if not os.path.isfile(target):
            return DataError(f"{where}: expected a file below {self.root}, found none")
        encoded = encode_file(Path(target))
        return DataError(f"{self.path}: line {number}: {encoded}") if isinstance(encoded, DataError) else encoded


def _resolved(name: str, root: str, folders: dict[str, str]) -> str:
    """The path without links. folders: as they were resolved before, for it takes longer than reading a small image."""
    folder, file = os.path.split(name)
    if folder not in folders:
        folders[folder] = os.path.realpath(os.path.join(root, folder))
    target = os.path.join(folders[folder], file)
    return os.path.realpath(target) if os.path.islink(target) else target


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, byte offset, content) of each line but empty ones."""
    begin = 0
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE):
                number += 1
                if len(line) == _MOST_LINE:
                    raise DataError(f"{path}: line {number}: expected less than {_MOST_LINE} bytes, found more")
                if content := line.rstrip(b"\r\n"):
                    yield number, begin, content
                begin += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected a list of images") from None


def _find_order(path: Path) -> str:
    """The only order that fits all lines; what comes behind the line that decides is read later."""
    number = 0
    for number, _, line in _lines(path):
        fitting = [order for order in COLUMNS if not _misfit(line.split(b"\t"), order)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            both = " or ".join(f"{order}'s columns ({what})" for order, what in COLUMNS.items())
            raise _expected(path, number, both, f"{line!r:.200}")
    if not number:
        raise DataError(f"{path}: expected a line for each image, found none")
    both = " and ".join(f"{order} ({what})" for order, what in COLUMNS.items())
    raise DataError(f"{path}: every line fits {both}: say with --columns which it is")


def _misfit(fields: list[bytes], order: str) -> str:
    """What is found instead of that order of columns; nothing where it fits."""
    if len(fields) < 3:
        return f"{len(fields)} columns: {b'|'.join(fields)!r:.200}"
    if order == "face2rec":
        numbers, first = fields[2:], fields[0] in (b"0", b"1")
    else:
        numbers, first = fields[1:-1], bool(_CLASS.fullmatch(fields[0]))
    if not first:
        return f"{fields[0]!r:.200} in the first column"
    if odd := next((field for field in numbers if not _NUMBER.fullmatch(field)), None):
        return f"{odd!r:.200} for a number"
    return "" if all(fields) else "an empty column"


def _label_place(order: str) -> int:
    return 2 if order == "face2rec" else 1


def _class_of(path: Path, number: int, field: bytes) -> int:
    match = _CLASS.fullmatch(field)
    if not match:
        raise _expected(
            path, number, "a label that is a whole number from 0 on, of 18 digits at most", f"{field!r:.100}"
        )
    return int(match[1])


def _check_path(path: Path, number: int, name: bytes) -> None:
    try:
        name.decode()
    except UnicodeDecodeError:
        raise _expected(path, number, "a path in UTF-8", f"{name!r:.300}") from None
    if b"\0" in name or name.startswith(b"/") or b".." in name.split(b"/"):
        raise _expected(path, number, "a path below --root", f"{name.decode()!r:.300}")


def _expected(path: Path, number: int, expected: str, found: str) -> DataError:
    return DataError(f"{path}: line {number}: expected {expected}, found {found}")
