"""Identification: is the right person first among many? Rank-k, and TPIR at an FPIR, by blocks of the gallery.

Scores are cosines, made in float64 and rounded to float32: what is equal then ties, in whatever block it was made, and
a tie never counts as found.

Legend: Q probes, G gallery entries, D components, K best scores that are kept, M searches of a person who is there, U
searches of one who is not, b entries of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from evaluation.embed.files import Ints
from evaluation.roc import Floats, TarAtFar, roc_of, tar_at_far

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
Scores = npt.NDArray[np.float32]

_PROBES = 1024
"""Compared with a block of the gallery at a time."""
_LOWEST = -2.0
"""Below any cosine."""


class Identification(NamedTuple):
    """rank: share of searches that found the person among the first k, by k. tpir: in the order of the rates asked for;
    `far` and `tar` of an entry are FPIR and TPIR. mated, non_mated: searches.
    """

    rank: dict[int, float]
    tpir: tuple[TarAtFar, ...]
    mated: int
    non_mated: int


def best_scores(
    probe_QD: Floats,
    gallery: Iterable[tuple[int, Floats]],
    count: int,
    *,
    leave_out_Q: Ints | None = None,
    progress: Callable[[int], None] = lambda entries: None,
) -> Scores:
    """The K = count highest scores of each probe in the gallery, falling, float32 (Q, K); -inf where it is smaller.

    probe_QD: unit rows. gallery: (first entry, unit rows (b, D)) one after the other. leave_out_Q: an entry that is
    not compared with the probe, its own person's; -1: none. progress: called with the number of entries that are done.
    Q x b scores at a time are never kept; work O(Q G D).
    """
    best_QK = torch.full((len(probe_QD), count), -torch.inf, dtype=torch.float32)
    probes = torch.from_numpy(probe_QD)
    for first, rows_bD in gallery:
        entries_Db = torch.from_numpy(rows_bD).T
        for start in range(0, len(probes), _PROBES):
            part = slice(start, start + _PROBES)
            score_qb = (probes[part] @ entries_Db).float()
            if leave_out_Q is not None:
                out_q = leave_out_Q[part] - first
                here = np.flatnonzero((out_q >= 0) & (out_q < len(rows_bD)))
                score_qb[here, out_q[here]] = -torch.inf
            highest = score_qb.topk(min(count, score_qb.shape[1]), dim=1).values
            best_QK[part] = torch.cat([best_QK[part], highest], dim=1).topk(count, dim=1).values
        progress(len(rows_bD))
    return best_QK.numpy()


def cosines(first_MD: Floats, second_MD: Floats) -> Scores:
    """Of row m with row m, as `best_scores` has them. Rows of unit length."""
    return np.asarray(np.einsum("md,md->m", first_MD, second_MD), np.float32)


def identification(
    mate_M: Scores,
    others_QK: Scores,
    probe_M: Ints,
    non_mated_U: Scores,
    *,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> Identification:
    """Figures of M searches for a person who is there, and U for one who is not.

    mate_M: score of the right entry. others_QK: highest scores of all other entries, of each probe, K >= the highest
    rank asked for; probe_M: whose. non_mated_U: the highest score of each search whose person is not there.

    Found at rank k: fewer than k others score as high or higher. TPIR at FPIR f: share of the M searches in which the
    right entry is first and reaches the threshold, at the best threshold that at most f of the U searches reach (of
    P. Grother et al., Face Recognition Vendor Test, identification: 1 - FNIR at rank 1). It is nan, with the reason,
    where f asks for less than one of the U. Raises ValueError for no searches, ranks beyond K and rates outside (0, 1).
    """
    if not len(mate_M):
        raise ValueError("expected at least one search for a person who is there, got none")
    if min(ranks) < 1 or max(ranks) > others_QK.shape[1]:
        raise ValueError(f"ranks: expected 1 … {others_QK.shape[1]}, got {list(ranks)}")
    if not all(0 < fpir < 1 for fpir in fpirs):
        raise ValueError(f"FPIR: expected numbers between 0 and 1, got {list(fpirs)}")
    rank = {k: float(np.mean(mate_M > others_QK[probe_M, k - 1])) for k in ranks}
    return Identification(rank, _tpir(mate_M, others_QK[probe_M, 0], non_mated_U, fpirs), len(mate_M), len(non_mated_U))


def _tpir(mate_M: Scores, other_M: Scores, non_mated_U: Scores, fpirs: Sequence[float]) -> tuple[TarAtFar, ...]:
    """As TAR at FAR of searches in place of pairs: one that is not first is below every threshold."""
    if not len(non_mated_U):
        reason = "FPIR needs searches of persons who are not in the gallery, there are none"
        return tuple(TarAtFar(far=fpir, tar=np.nan, threshold=np.nan, reason=reason) for fpir in fpirs)
    scores = np.append(np.where(mate_M > other_M, mate_M, _LOWEST), non_mated_U).astype(np.float64)
    roc = roc_of(scores, np.arange(len(scores)) < len(mate_M))
    found = []
    for fpir in fpirs:
        entry = tar_at_far(roc, fpir)
        reason = entry.reason.replace("FAR", "FPIR").replace("pairs of two persons", "searches of persons not there")
        found.append(TarAtFar(far=fpir, tar=entry.tar, threshold=entry.threshold, reason=reason))
    return tuple(found)
