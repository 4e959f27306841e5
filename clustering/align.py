"""Which cluster belongs to which class, and the loss that draws a class centre to its cluster. Ours: docs/method.md.

Legend: N rows of the global batch, D embedding size, R classes of this rank, K clusters, Q non-zero entries of T.
In `alignment_loss`: C classes of this rank, M sub-centres of each, X = C M rows of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.hardness import CountTable
from partial_fc.collectives import GatheredBatch, SumOverRanks, all_reduce_


def match_classes(
    table: CountTable, group: dist.ProcessGroup, attempt: Callable[[Callable[[], Tensor], Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy one-to-one matching of classes and clusters by T, the same for any number of ranks.

    The greedy rule takes the entries of T by (count descending, class, cluster) and matches each whose class and
    cluster are both free. Here all entries that are the best left of their class and of their cluster are
    matched at once, round by round. In that total order nothing that comes before such an entry shares its class
    or cluster, so the greedy rule takes it too; hence both end with the same matching.

    Returns (class_K, owner_K), int64 (K,), the same on all ranks. class_K: the matched class, -1 for none.
    owner_K: the matched class, for an extra cluster the class of largest count, -1 for an empty cluster.
    attempt: runs this rank's part of a round, or gives what stands for nothing (-1 for each cluster) where it cannot.
    Collectives: two all-reduces of K int64 a round, one more at the end. Rounds: a few on data of faces; at
    most one for each class.
    """
    free_Q = torch.ones_like(table.row_Q, dtype=torch.bool)
    nothing_K = table.cluster_Q.new_full((table.num_clusters,), -1)
    class_K = nothing_K.clone()
    owner_K: Tensor | None = None

    def local(work: Callable[[], Tensor]) -> Tensor:
        """Never `nothing_K` itself: the ranks' parts are reduced in place."""
        return work() if attempt is None else attempt(work, nothing_K).clone()

    while True:
        key_K = local(functools.partial(_keys, table, free_Q, class_K))
        best_K, _ = table.class_of(all_reduce_(key_K, group, dist.ReduceOp.MAX))
        if owner_K is None:
            owner_K = best_K
        if not bool((best_K >= 0).any()):
            return class_K, torch.where(class_K >= 0, class_K, owner_K)
        found_K = local(functools.partial(_mutual, table, free_Q, class_K, best_K))
        all_reduce_(found_K, group, dist.ReduceOp.MAX)
        class_K = torch.where(found_K >= 0, found_K, class_K)


def _keys(table: CountTable, free_Q: Tensor, class_K: Tensor) -> Tensor:
    """`CountTable.class_keys` of the entries whose class and cluster are both free."""
    return table.class_keys(free_Q & (class_K[table.cluster_Q] < 0))


def _mutual(table: CountTable, free_Q: Tensor, class_K: Tensor, best_K: Tensor) -> Tensor:
    """The classes here that are the best of their best cluster, at their clusters, int64 (K,); -1 elsewhere.

    best_K: the best class of each cluster. Takes the entries of these classes out of free_Q.
    """
    best_R = table.best_cluster(free_Q & (class_K[table.cluster_Q] < 0))
    class_R = torch.arange(table.shard.start, table.shard.stop, device=best_R.device)
    mutual_R = (best_R >= 0) & (best_K[best_R.clamp_min(0)] == class_R)
    free_Q &= ~mutual_R[table.row_Q]
    found_K = torch.full_like(class_K, -1)
    found_K[best_R[mutual_R]] = class_R[mutual_R]
    return found_K


def _first_of_each(values_N: Tensor) -> Tensor:
    """True at one place of every distinct value, bool (N,), without a host sync."""
    sorted_N, order_N = values_N.sort(stable=True)
    first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return torch.empty_like(first_N).scatter_(0, order_N, first_N)


def alignment_loss(batch: GatheredBatch, weight_XD: Tensor, anchor_CD: Tensor, f_C: Tensor, first_class: int) -> Tensor:
    """L_al = mean over the distinct classes of the global batch of F_y (1 - cos(W_y, a_y)): a scalar, global.

    weight_XD: raw class centres of this rank, M rows a class; with sub-centres W_y is the one nearest to a_y.
    anchor_CD: a_y, the unit centre of the cluster matched to class y, without gradient, one row a class of this rank.
    f_C: F_y. first_class: the shard's first. A class centre's gradient is complete on its owner, tangent to it, and
    sparse: only rows of classes in the batch, so that a row-sparse optimizer leaves the others alone (a rank that owns
    none of them names its first class, with a gradient of zero). Forward runs one all-reduce of one float; no host
    sync.
    """
    labels_N = batch.labels_N
    distinct_N = _first_of_each(labels_N) & (labels_N >= 0)
    classes = len(anchor_CD)
    if not classes or not len(labels_N):
        part = F.embedding(labels_N[:0], weight_XD, sparse=True).float().sum()
    else:
        M = len(weight_XD) // classes
        owned_N = distinct_N & (labels_N >= first_class) & (labels_N < first_class + classes)
        # Rows that are not this rank's stand in for one that is, so that all have one; they count for nothing.
        self_N = torch.arange(len(labels_N), device=labels_N.device)
        known_N = labels_N[torch.where(owned_N, self_N, owned_N.int().argmax())]
        class_N = torch.where(owned_N.any(), known_N - first_class, 0)
        row_NM = class_N[:, None] * M + torch.arange(M, device=class_N.device)
        w_NMD = F.normalize(F.embedding(row_NM, weight_XD, sparse=True).float(), dim=2)
        gap_N = 1 - (w_NMD * anchor_CD[class_N][:, None]).sum(2).amax(1)
        part = torch.where(owned_N, f_C[class_N] * gap_N, 0).sum() / distinct_N.sum().clamp_min(1)
    total: Tensor = SumOverRanks.apply(part, batch.group)  # type: ignore[no-untyped-call]
    return total
