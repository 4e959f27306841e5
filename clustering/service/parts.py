"""Embeddings on disk: one .npy file, or a folder of them, as one matrix that is read where it lies.

Legend: N rows of all files, D components of an embedding, b rows of a block.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clustering.job.together import InputError

_KINDS = "float16, float32 or float64"


@dataclass(frozen=True, slots=True)
class Part:
    """One file."""

    path: Path
    rows: int
    dtype: np.dtype[Any]
    matrix_nD: npt.NDArray[Any]
    """Mapped, not read."""


class PartFiles:
    """The rows of all parts, one after the other."""

    def __init__(self, source: Path) -> None:
        """source: a .npy file of float16, float32 or float64 (N, D), or a folder of such files, which are taken in
        natural order of their names (part2 before part10); other files in it are left alone.

        Raises InputError when there is none, or one is damaged, of another kind, or of another D than the first.
        """
        self.source = source
        self.parts = [_open(path) for path in _paths(source)]
        widths = {part.matrix_nD.shape[1]: part.path for part in reversed(self.parts) if part.rows}
        if not widths:
            raise InputError(f"{source}: expected embeddings, got 0 rows: embed some images first")
        if len(widths) > 1:
            (first, path), (second, other) = list(widths.items())[-1], next(iter(widths.items()))
            raise InputError(
                f"{other}: expected rows of {first} components as in {path.name}, got {second}: keep embeddings of "
                "different models in different folders"
            )
        self.dim: int = next(iter(widths))
        """D."""
        wide = any(part.dtype.itemsize == 8 for part in self.parts if part.rows)
        self._dtype = np.dtype(np.float64 if wide else np.float32)
        ends = list(itertools.accumulate(part.rows for part in self.parts))
        self._starts = [0, *ends[:-1]]
        self.rows: int = ends[-1]
        """N."""

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop - 1, (stop - start, D): float64 where any of the files is, else float32."""
        rows_bD = np.empty((max(0, min(stop, self.rows) - start), self.dim), self._dtype)
        for part, first in self._overlapping(start, stop):
            block_nD = part.matrix_nD[max(0, start - first) : stop - first]
            at = max(0, first - start)
            rows_bD[at : at + len(block_nD)] = block_nD
        return rows_bD

    def take(self, row_Q: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows in any order, (Q, D), as `read` gives them."""
        rows_QD = np.empty((len(row_Q), self.dim), self._dtype)
        part_Q = np.searchsorted(self._starts, row_Q, side="right") - 1
        for number in np.unique(part_Q):
            chosen_Q = part_Q == number
            rows_QD[chosen_Q] = self.parts[number].matrix_nD[row_Q[chosen_Q] - self._starts[number]]
        return rows_QD

    def where(self, row: int) -> str:
        """The file and the row in it, for messages."""
        part, first = self._overlapping(row, row + 1)[0]
        return f"row {row - first} of {part.path}"

    def _overlapping(self, start: int, stop: int) -> list[tuple[Part, int]]:
        found, number = [], max(0, bisect.bisect_right(self._starts, start) - 1)
        while number < len(self.parts) and self._starts[number] < stop:
            if self.parts[number].rows and self._starts[number] + self.parts[number].rows > start:
                found.append((self.parts[number], self._starts[number]))
            number += 1
        return found


def _paths(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    try:
        paths = [path for path in source.iterdir() if path.suffix == ".npy" and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{source}: cannot read it ({error.strerror})") from None
    if not paths:
        raise InputError(f"{source}: expected .npy files in this folder, got none")
    return sorted(paths, key=lambda path: (natural(path.name), path.name))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which part2 sorts before part10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(piece)) if piece.isascii() and piece.isdigit() else (1, piece) for piece in pieces if piece]


def _open(path: Path) -> Part:
    shape, fortran, dtype, offset = read_header(path)
    if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or shape[1] < 1:
        raise InputError(f"{path}: expected {_KINDS} of shape (rows, components), got {dtype} {shape}")
    return Part(path, shape[0], dtype, _mapped(path, shape, fortran, dtype, offset))


def read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, dtype and place of the numbers of a .npy file whose size is what its header says.

    Nothing is unpickled. Raises InputError.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"format {version[0]}.{version[1]}")
            shape, fortran, dtype = readers[version](file)
            offset = file.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path}: not an .npy file as numpy.save writes it ({said:.160})") from None
    if dtype.hasobject or min(shape, default=0) < 0:
        raise InputError(f"{path}: expected numbers, got {dtype} {shape}")
    count = dtype.itemsize * math.prod(int(length) for length in shape)
    if size != offset + count:
        what = "cut short" if size < offset + count else "longer than its header says"
        raise InputError(
            f"{path}: {what}: expected {offset + count} bytes for {dtype} {shape}, got {size}: write it again"
        )
    return tuple(int(length) for length in shape), fortran, dtype, offset


def map_array(path: Path, *, kinds: str, shape: tuple[int | None, ...], what: str) -> npt.NDArray[Any]:
    """A .npy file, mapped and not read, of that shape (None: any length) and a dtype of `kinds` (numpy's letters).

    what: such a file in words. Raises InputError.
    """
    found, fortran, dtype, offset = read_header(path)
    fits = len(found) == len(shape) and all(want in (None, got) for want, got in zip(shape, found, strict=True))
    if not fits or dtype.kind not in kinds:
        raise InputError(f"{path}: expected {what}, got {dtype} {found}")
    return _mapped(path, found, fortran, dtype, offset)


def _mapped(path: Path, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], offset: int) -> npt.NDArray[Any]:
    if not math.prod(shape):
        return np.empty(shape, dtype)  # nothing to map
    try:
        order: Any = "F" if fortran else "C"
        return np.memmap(path, dtype=dtype, shape=shape, order=order, mode="r", offset=offset)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot map it into memory ({error})") from None


def contains(source: Path, path: Path) -> bool:
    """Whether `path` would be taken for one of the parts of `source`."""
    folder = Path(os.path.realpath(source))
    target = Path(os.path.realpath(path))
    return target in (folder, folder / target.name) and (folder == target or folder.is_dir())
