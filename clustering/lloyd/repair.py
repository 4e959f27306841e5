"""Which points start clusters that have none: seeding as in `clustering.kmeans`, with clusters in the place of classes.

Of each cluster the worst-fitted point is a candidate (the first of equals on the coarse grid of `fit_level`), unless it
is well fitted; the j-th empty cluster starts at the j-th worst candidate, ties going to the smaller cluster. The point
stays a member of the cluster that it is in.

Legend: P points of this rank, K clusters, E empty clusters, J of them that get a point, D embedding size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import FIT_LEVELS, WELL_FITTED, fit_level
from clustering.service.rows import Rows
from partial_fc.collectives import all_reduce_

_ROW_BITS = 40
_NO_CANDIDATE = torch.iinfo(torch.int64).max


def seeds(
    best_P: Tensor, index_P: Tensor, counts_K: Tensor, *, first_row: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(cluster_J, row_J): int64, the empty clusters that start anew, and the rows among those of all ranks they take.

    best_P: float64 cosine to the cluster index_P, -1: none. counts_K: int64 over all ranks. first_row: of this rank.
    The same on all ranks. Collectives: one all-reduce of K int64, none when no cluster is empty.
    """
    empty_E = (counts_K == 0).nonzero()[:, 0]
    if not len(empty_E):
        return empty_E, empty_E
    level_P = fit_level(best_P)
    point_Q = ((index_P >= 0) & (level_P < WELL_FITTED)).nonzero()[:, 0]
    key_Q = ((level_P[point_Q] + FIT_LEVELS) << _ROW_BITS) + first_row + point_Q
    key_K = torch.full_like(counts_K, _NO_CANDIDATE).scatter_reduce_(0, index_P[point_Q], key_Q, "amin")
    all_reduce_(key_K, group, dist.ReduceOp.MIN)
    candidate_Q = (key_K != _NO_CANDIDATE).nonzero()[:, 0]
    by_fit_Q = (key_K[candidate_Q] >> _ROW_BITS).argsort(stable=True)[: len(empty_E)]
    row_J = key_K[candidate_Q[by_fit_Q]] & ((1 << _ROW_BITS) - 1)
    return empty_E[: len(row_J)], row_J


def gather_rows(rows: Rows, row_J: Tensor, *, first_row: int, group: dist.ProcessGroup) -> Tensor:
    """Any rows of all ranks' on every rank, float32 (J, D). One all-reduce, none for no rows."""
    found_JD = torch.zeros(len(row_J), rows.dim, device=row_J.device)
    if not len(row_J):
        return found_JD
    mine_J = (row_J >= first_row) & (row_J < first_row + len(rows))
    found_JD[mine_J] = rows.take(row_J[mine_J] - first_row).float()
    return all_reduce_(found_JD, group)
