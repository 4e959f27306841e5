"""Embeddings and labels as the report reads them: unit rows, sorted by label.

Legend: N samples, P samples with an embedding, sorted by (label, sample), D embedding size, C labels, b of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clustering.job.together import InputError
from clustering.service.parts import PartFiles

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Unit embeddings with labels, as everything here reads them."""

    x_PD: Floats
    """Unit rows, sorted by (label, sample)."""
    label_P: Ints
    sample_P: Ints
    start_C: Ints
    """(C + 1,): rows start_C[y] … start_C[y + 1] - 1 are those of label y."""
    without: Ints
    """Samples whose embedding is a row of zeros, ascending: images that could not be read. They take no part."""

    @property
    def num_labels(self) -> int:
        return len(self.start_C) - 1

    def rows(self, label: int) -> slice:
        return slice(int(self.start_C[label]), int(self.start_C[label + 1]))


def labelled(embeddings: PartFiles, labels: Ints, num_labels: int, *, block: int = 65536) -> Labelled:
    """Read, sort and scale. embeddings: N rows; row i is sample i. labels: int64 (N,), 0 … num_labels - 1.

    Needs 4 N D bytes. Raises InputError for numbers that do not fit, labels out of range, embeddings that are not
    finite, or not one usable row.
    """
    if labels.shape != (embeddings.rows,):
        raise InputError(
            f"{embeddings.source}: expected a row for each of {len(labels)} labels, got {embeddings.rows}: row i must "
            "be sample i of the same set"
        )
    if not 0 <= labels.min() <= labels.max() < num_labels:
        raise InputError(f"labels: expected 0 … {num_labels - 1}, got {labels.min()} … {labels.max()}")
    usable_N = np.zeros(len(labels), dtype=bool)
    for start in range(0, len(labels), block):
        x_bD = embeddings.read(start, start + block)
        finite_b = np.isfinite(x_bD).all(1)
        if not finite_b.all():
            where = embeddings.where(start + int(np.argmin(finite_b)))
            raise InputError(f"{where}: expected finite numbers, got nan or inf: has the training diverged?")
        usable_N[start : start + block] = x_bD.any(1)
    sample_P = np.flatnonzero(usable_N)
    if not len(sample_P):
        raise InputError(f"{embeddings.source}: expected at least one row that is not all zeros")
    sample_P = sample_P[np.argsort(labels[sample_P], kind="stable")]
    x_PD = np.empty((len(sample_P), embeddings.dim), np.float32)
    for start in range(0, len(sample_P), block):
        rows_bD = embeddings.take(sample_P[start : start + block]).astype(np.float64)
        rows_bD /= np.abs(rows_bD).max(1, keepdims=True)  # squares of very small or large numbers leave the range
        x_PD[start : start + block] = rows_bD / np.linalg.norm(rows_bD, axis=1, keepdims=True)
    label_P = labels[sample_P].astype(np.int64)
    return Labelled(
        x_PD=x_PD,
        label_P=label_P,
        sample_P=sample_P,
        start_C=np.searchsorted(label_P, np.arange(num_labels + 1)),
        without=np.flatnonzero(~usable_N),
    )
