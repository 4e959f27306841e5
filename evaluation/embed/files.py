"""Embeddings in one .npy file, read in blocks where it lies; a row that means nothing is named, never left out.

Legend: N rows, D components of an embedding, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from evaluation.roc import Floats

_BLOCK = 4096
"""Rows converted to float64 at a time: 16 MB for an embedding of 512."""
_NAMED = 5
"""Bad rows that an error lists."""
Ints = npt.NDArray[np.int64]


class EmbeddingFile:
    """The rows of a file: float16, float32 or float64, mapped and not read."""

    def __init__(self, path: Path, *, halves: bool = False) -> None:
        """halves: a row holds the embedding of the image and then that of its mirror image; a row read is their sum.

        Raises DataError for anything but a .npy file of floating-point (N, components) with N >= 1 whose size is what
        its header says, and for an odd number of components where they are halves. Nothing is unpickled.
        """
        self.path = path
        self._halves = halves
        self._matrix = map_array(path, kinds="f", dimensions=2, what="embeddings, floating point (images, components)")
        components = self._matrix.shape[1]
        if halves and components % 2:
            raise DataError(
                f"{path}: expected an even number of components, the image's and its mirror image's, got {components}"
            )
        self.rows: int = self._matrix.shape[0]
        """N."""
        self.dim: int = components // 2 if halves else components
        """D."""

    def block(self, start: int, stop: int) -> Floats:
        """Rows start … stop - 1 as float64 (b, D), of the length they have.

        Raises DataError, which names rows, for numbers that are not finite and for rows of zeros: they have no
        direction, and `python -m evaluation embed` writes them for images that do not decode.
        """
        x_bD = self._matrix[start:stop].astype(np.float64)
        if self._halves:
            x_bD = x_bD[:, : self.dim] + x_bD[:, self.dim :]
        self._refuse(start, np.asarray(~np.isfinite(x_bD).all(axis=1)), "numbers that are not finite")
        self._refuse(start, np.asarray(~x_bD.any(axis=1)), "only zeros, which have no direction")
        return x_bD

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """(first row, rows), in order, all of them."""
        for start in range(0, self.rows, _BLOCK):
            yield start, self.block(start, min(start + _BLOCK, self.rows))

    def unit_blocks(self) -> Iterator[tuple[int, Floats]]:
        """The same, rows of unit length."""
        for start, x_bD in self.blocks():
            yield start, unit(x_bD)

    def _refuse(self, start: int, bad_b: npt.NDArray[np.bool_], what: str) -> None:
        if bad_b.any():
            rows = start + np.flatnonzero(bad_b)
            listed = ", ".join(map(str, rows[:_NAMED])) + (", …" if len(rows) > _NAMED else "")
            raise DataError(
                f"{self.path}: row {rows[0]}: expected an embedding, found {what} (rows {listed} up to row "
                f"{start + len(bad_b) - 1}): embed these images again"
            )


def unit(x_bD: Floats) -> Floats:
    """Rows of unit length, float64. Rows must be finite and not zero; their squares may overflow."""
    x_bD = x_bD / np.abs(x_bD).max(axis=1, keepdims=True)
    return np.asarray(x_bD / np.sqrt(np.einsum("bd,bd->b", x_bD, x_bD))[:, None])


def read_labels(path: Path, rows: int) -> Ints:
    """A label for each of `rows` embeddings: whole numbers (rows,) in a .npy file. Raises DataError."""
    labels = map_array(path, kinds="iu", dimensions=1, what="labels, whole numbers (images,)")
    if len(labels) != rows:
        raise DataError(f"{path}: expected a label for each of {rows} embeddings, found {len(labels)}")
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{path}: expected labels below 2^63, found {labels.max()}")
    return labels.astype(np.int64)


def map_array(path: Path, *, kinds: str, dimensions: int, what: str) -> npt.NDArray[Any]:
    """A .npy file, mapped. kinds: numpy's letters of the dtypes that are expected. Raises DataError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror or error}): expected {what}") from None
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: expected {what}, as numpy.save writes them ({reason:.160})") from None
    if not isinstance(array, np.memmap):  # an archive of several
        raise DataError(f"{path}: expected {what} in one .npy file, found {type(array).__name__}")
    if array.ndim != dimensions or array.dtype.kind not in kinds or not array.size or array.dtype.itemsize > 8:
        raise DataError(f"{path}: expected {what}, found {array.dtype} of shape {array.shape}")
    if size != array.offset + array.nbytes:
        raise DataError(
            f"{path}: expected {array.offset + array.nbytes} bytes for {array.dtype} {array.shape}, found {size}: "
            "write it again"
        )
    return array
