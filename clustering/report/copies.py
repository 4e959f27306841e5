"""Images that are stored more than once: pairs of samples whose embeddings are nearly the same.

They are looked for where copies lie: among the samples of a label, and among those of a cluster, whatever their labels.

Legend: P samples with an embedding, D embedding size, T pairs, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clustering.report.data import Bools, Doubles, Floats, Ints, Labelled

NEARLY_THE_SAME = 0.99
"""Cosine of copies: the same picture stored again by another encoder stays above it, two pictures of a person below."""
_BLOCK = 2048


class Copies(NamedTuple):
    """Copies and what they are copies of, by (first place of the original, sample); (T,) each."""

    place_T: Ints
    of_T: Ints
    """The original of each: of all that are copies of each other the first that is not suspect. A place, as place_T."""
    cosine_T: Doubles


def find_copies(data: Labelled, cluster_P: Ints, suspect_P: Bools) -> Copies:
    """Copies among all samples. Places are rows of data.x_PD.

    Copies of copies count as copies of the same original. n^2 D for each label and cluster of n samples, a block at a
    time.
    """
    by_cluster = np.argsort(cluster_P, kind="stable")
    ends = np.flatnonzero(np.diff(cluster_P[by_cluster], append=-2)) + 1
    root_P = np.arange(len(data.x_PD))

    def root(place: int) -> int:
        while root_P[place] != place:
            root_P[place] = root_P[root_P[place]]
            place = root_P[place]
        return place

    def join(first: int, second: int) -> None:
        one, other = sorted((root(first), root(second)))
        root_P[other] = one

    for label in range(data.num_labels):
        rows = data.rows(label)
        _near_pairs(data.x_PD[rows], np.arange(rows.start, rows.stop), join)
    start = 0
    for end in ends.tolist():
        rows_n = by_cluster[start:end]
        _near_pairs(data.x_PD[rows_n], rows_n, join)
        start = end
    return _originals(data, np.array([root(place) for place in range(len(root_P))]), suspect_P)


def _near_pairs(x_nD: Floats, place_n: Ints, found: Callable[[int, int], None]) -> None:
    for start in range(0, len(x_nD), _BLOCK):
        cos_bn = x_nD[start : start + _BLOCK] @ x_nD[start:].T
        for row, column in np.argwhere(np.triu(cos_bn >= NEARLY_THE_SAME, 1)).tolist():
            found(int(place_n[start + row]), int(place_n[start + column]))


def _originals(data: Labelled, root_P: Ints, suspect_P: Bools) -> Copies:
    together = np.flatnonzero(np.bincount(root_P, minlength=len(root_P))[root_P] > 1)
    order = together[np.lexsort((data.sample_P[together], suspect_P[together], root_P[together]))]
    first = np.diff(root_P[order], prepend=-1) != 0
    of = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    place_T, of_T = order[~first], of[~first]
    cosine_T = np.einsum("td,td->t", data.x_PD[place_T].astype(np.float64), data.x_PD[of_T].astype(np.float64))
    by = np.lexsort((data.sample_P[place_T], data.sample_P[of_T]))
    return Copies(place_T[by], of_T[by], cosine_T[by])
