"""Parquet files with a column of encoded images and one of labels, read in small batches and never as a whole.

Needs pyarrow, the extra `parquet` of this package. Rows are (file, row group, row of it).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.extras import installing
from data.errors import DataError
from data.files import check_same, identified
from data.making.sources import encode_image

Ints = npt.NDArray[np.int64]
_BATCH = 64
"""Images that are decoded at a time."""
_LABELS = 1 << 16
"""Labels that are read at a time."""
_MOST_NAME = 1000
"""Characters of a label."""
_BUFFER = 1 << 20
"""Bytes of a column that are read at a time."""


class Table(NamedTuple):
    """rows (N, 3), labels (N,), names of the labels where they are strings, number of row groups."""

    source: ParquetSource
    rows: Ints
    labels: Ints
    names: list[str]
    groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetSource:
    """The images of a column. identity: of the files."""

    paths: Sequence[Path]
    column: str
    identity: Sequence[str]

    def encode(self, wanted: Ints) -> list[bytes | DataError]:
        """Raises DataError when a file cannot be read, or is another one."""
        self.check(np.unique(wanted[:, 0]).tolist())
        encoded: list[bytes | DataError] = [b""] * len(wanted)
        cursor = _cursor_of(self)
        for place in np.lexsort(wanted.T[::-1]).tolist():  # each batch once
            row = wanted[place].tolist()
            encoded[place] = encode_cell(cursor.at(*row), self.where(*row))
        return encoded

    def listing(self) -> Iterator[str]:
        yield from self.identity
        yield self.column

    def check(self, numbers: Iterable[int] | None = None) -> None:
        check_same(self.paths, self.identity, numbers)

    def where(self, file: int, group: int, row: int) -> str:
        """A row, for messages."""
        return f"{self.paths[file]}: row {row} of row group {group}"

    def cells(self, file: int, group: int) -> Iterator[Any]:
        """Batches of a row group: arrays of bytes. Raises DataError."""
        path = self.paths[file]
        self.check([file])
        with _readable(path):
            parquet = _open(path)
            kind = _image_type(path, parquet, self.column)
            of_it = f"{self.column}.bytes" if kind == "struct" else self.column
            for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=[of_it], use_threads=False):
                column = batch.column(0)
                yield column.flatten()[0] if kind == "struct" else column


class Cursor:
    """Reads rows in ascending order; keeps one batch.

    One cursor passes over each row group once at most. Each worker has one and reads a group up to the rows it is
    given, so among W workers a group of many tasks is decoded up to W times.
    """

    def __init__(self, source: ParquetSource) -> None:
        self.source = source
        self._group = (-1, -1)
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._start = 0

    def at(self, file: int, group: int, row: int) -> bytes | None:
        """The image; None for a null. Raises DataError."""
        if self._group != (file, group) or row < self._start:
            self._group, self._batches = (file, group), self.source.cells(file, group)
            self._batch, self._start = (), 0
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise DataError(
                    f"{self.source.where(file, group, row)}: expected it, found the end: the file was changed"
                )
            self._batch = batch
        cell: bytes | None = self._batch[row - self._start].as_py()
        return cell


_cursor: Cursor | None = None
"""In a worker: where it reads, for the next task goes on near by."""


def _cursor_of(source: ParquetSource) -> Cursor:
    global _cursor  # noqa: PLW0603
    if _cursor is None or _cursor.source != source:
        _cursor = Cursor(source)
    return _cursor


def encode_cell(cell: bytes | None, where: str) -> bytes | DataError:
    """A cell of an image column as `encode_image` makes it."""
    if cell is None:
        return DataError(
            f"{where}: expected the bytes of an image, found none: a path alone is not followed, store them"
        )
    try:
        return encode_image(cell)
    except ValueError as error:
        return DataError(f"{where}: {error}")


def read_table(paths: Sequence[Path], *, image_column: str, label_column: str) -> Table:
    """All labels, and where their images are. Raises DataError for columns of other kinds, or labels that are none."""
    rows, labels = [], []
    known: dict[str, int] = {}
    kinds, groups = set(), 0
    identity = tuple(identified(paths))  # before they are read, so that no change is missed
    for number, path in enumerate(paths):
        with _readable(path):
            parquet = _open(path)
            if parquet.metadata.num_rows > path.stat().st_size:
                raise DataError(f"{path}: expected rows with images, found {parquet.metadata.num_rows} in a small file")
            _image_type(path, parquet, image_column)
            kinds.add(_label_type(path, parquet, label_column))
            for group in range(parquet.metadata.num_row_groups):
                groups += 1
                of_it = list(_labels(path, parquet, group, label_column, known))
                count = sum(map(len, of_it))
                labels += of_it
                rows.append(np.stack([np.full(count, number), np.full(count, group), np.arange(count)], axis=1))
    if not groups or not sum(map(len, labels)):
        raise DataError(f"{paths[0]}: expected rows with images, found none")
    if len(kinds) > 1:
        raise DataError(f"{paths[0].parent}: column {label_column}: expected one kind of labels, found {sorted(kinds)}")
    label_N = np.concatenate(labels)
    names = sorted(known)
    if names:
        rank = {name: number for number, name in enumerate(names)}
        label_N = np.array([rank[name] for name in known], np.int64)[label_N]
    source = ParquetSource(paths=tuple(paths), column=image_column, identity=identity)
    return Table(source, np.concatenate(rows), label_N, names, groups)


def jumps(rows: Ints) -> int:
    """How often a row group has to be begun to read rows in that order."""
    same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    return 1 + int(np.count_nonzero(~(same & (rows[1:, 2] > rows[:-1, 2]))))


def _labels(path: Path, parquet: Any, group: int, column: str, known: dict[str, int]) -> Iterator[Ints]:
    arrow = _pyarrow()
    start = 0
    for batch in parquet.iter_batches(_LABELS, row_groups=[group], columns=[column], use_threads=False):
        cells = batch.column(0)
        if arrow.types.is_dictionary(cells.type):
            cells = cells.dictionary_decode()
        if cells.null_count:
            raise DataError(f"{path}: row group {group}: column {column}: expected a label in each row, found a null")
        if arrow.types.is_integer(cells.type):
            values = np.asarray(cells.cast(arrow.int64()))
            if len(values) and values.min() < 0:
                raise DataError(
                    f"{path}: row group {group}: column {column}: expected labels from 0 on, found {values.min()}"
                )
            yield values
            continue
        coded = cells.dictionary_encode()
        code_N = np.asarray(coded.indices)
        names = coded.dictionary.to_pylist()
        if long := [code for code, name in enumerate(names) if len(name) > _MOST_NAME]:
            row = start + int(np.flatnonzero(np.isin(code_N, long))[0])
            raise DataError(
                f"{path}: row {row} of row group {group}: column {column}: expected a name of {_MOST_NAME:,} "
                f"characters at most, found {len(names[code_N[row - start]]):,}: is it the column of the labels?"
            )
        start += len(code_N)
        if bad := next((name for name in names if len(name.splitlines()) != 1), None):
            raise DataError(f"{path}: column {column}: expected names without line breaks, found {bad!r:.200}")
        if "" in names:
            raise DataError(f"{path}: row group {group}: column {column}: expected names, found an empty one")
        yield np.array([known.setdefault(name, len(known)) for name in names], np.int64)[code_N]


def _image_type(path: Path, parquet: Any, column: str) -> str:
    """ "binary" or "struct"."""
    types = _pyarrow().types
    kind = _type(path, parquet, column)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = kind.field("bytes").type
        if types.is_binary(inner) or types.is_large_binary(inner):
            return "struct"
    raise DataError(f"{path}: column {column}: expected bytes, or a struct with `bytes`, found {kind!s:.200}")


def _label_type(path: Path, parquet: Any, column: str) -> str:
    types = _pyarrow().types
    kind = _type(path, parquet, column)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(kind):
        return "integers"
    if types.is_string(kind) or types.is_large_string(kind):
        return "strings"
    raise DataError(f"{path}: column {column}: expected integers or strings, found {kind!s:.200}")


def _type(path: Path, parquet: Any, column: str) -> Any:
    schema = parquet.schema_arrow
    if schema.names.count(column) != 1:
        raise DataError(
            f"{path}: expected a column {column}, found {', '.join(schema.names):.300}: name it with --image-column or "
            "--label-column"
        )
    return schema.field(column).type


def _open(path: Path) -> Any:
    _pyarrow()
    return importlib.import_module("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise DataError(f"parquet files need pyarrow, {installing('parquet')}") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises into DataError."""
    errors = (_pyarrow().ArrowException, OSError)  # at hand when a reader is closed as Python ends
    try:
        yield
    except errors as error:
        said = " ".join(str(error).split())
        raise DataError(f"{path}: cannot read it as parquet ({said:.300})") from None
