"""Probes of known persons among a million others: is the other image of the same person the nearest?

Legend: Q probes, D components, M ordered pairs of two probes of one person, K best scores that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data.errors import DataError
from evaluation.embed.files import EmbeddingFile, Ints
from evaluation.identification import FPIRS, RANKS, Identification, best_scores, cosines, identification

_PAIRS = 1 << 15
"""Compared at a time: 128 MB for an embedding of 512."""


def among_distractors(
    probes: EmbeddingFile,
    label_Q: Ints,
    distractors: EmbeddingFile,
    *,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
    progress: Callable[[int], None] = lambda entries: None,
) -> tuple[Identification, int]:
    """Figures, and the number of probes that are the only one of their person.

    In turn each image of a person is the probe, and each other one of that person joins the distractors, alone: M
    searches of a person who is there (I. Kemelmacher-Shlizerman et al., The MegaFace Benchmark, CVPR 2016). The Q
    searches among the distractors alone are those of persons who are not there, for FPIR.

    Memory: 8 Q D + 24 M bytes. Raises DataError for rows as `EmbeddingFile.block` does, and when no person has two.
    """
    probe_QD = np.concatenate([x_bD for _, x_bD in probes.unit_blocks()])
    probe_M, mate_M = _pairs(label_Q)
    if not len(probe_M):
        raise DataError(
            f"{probes.path}: expected a person with two images, found none: are the labels those of persons?"
        )
    best_QK = best_scores(probe_QD, distractors.unit_blocks(), max(ranks), progress=progress)
    scores_M = np.empty(len(probe_M), np.float32)
    for start in range(0, len(probe_M), _PAIRS):
        part = slice(start, start + _PAIRS)
        scores_M[part] = cosines(probe_QD[probe_M[part]], probe_QD[mate_M[part]])
    found = identification(scores_M, best_QK, probe_M, best_QK[:, 0], ranks=ranks, fpirs=fpirs)
    return found, len(label_Q) - len(np.unique(probe_M))


def _pairs(label_Q: Ints) -> tuple[Ints, Ints]:
    """All ordered pairs of two rows with one label."""
    order_Q = np.argsort(label_Q, kind="stable")
    _, sizes = np.unique(label_Q, return_counts=True)
    groups = np.split(order_Q, np.cumsum(sizes)[:-1])
    firsts = [np.repeat(rows, len(rows) - 1) for rows in groups]
    seconds = [np.tile(rows, (len(rows), 1))[~np.eye(len(rows), dtype=bool)] for rows in groups]
    return np.concatenate(firsts), np.concatenate(seconds)
