"""Which cluster belongs to which class, and the loss that draws a class centre to its cluster. Ours: docs/method.md.

Legend: N rows of the global batch, D embedding size, R classes of this rank, K clusters, Q non-zero entries of T.
In `alignment_loss`: C classes of this rank, M sub-centres of each, X = C M rows of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.method.hardness import CountTable
from clustering.step.choice import step_ops
from partial_fc.collectives import GatheredBatch, SumOverRanks, all_reduce_, refuse_second_derivative


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


class _Aligned(torch.autograd.Function):
    """This rank's part of the loss; its gradient, which the forward pass makes, is sparse."""

    @staticmethod
    def forward(
        ctx: Any, weight_XD: Tensor, labels_N: Tensor, anchor_RD: Tensor, f_R: Tensor, first_class: int
    ) -> Tensor:
        part, row_N, gradient_ND = step_ops(weight_XD).align(labels_N, weight_XD, anchor_RD, f_R, first_class)
        ctx.save_for_backward(row_N, gradient_ND)
        ctx.size, ctx.dtype = weight_XD.shape, weight_XD.dtype
        return part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        row_N, gradient_ND = ctx.saved_tensors
        values_ND = (grad * gradient_ND).to(ctx.dtype)
        with torch.sparse.check_sparse_tensor_invariants(False):  # the argument alone leaves a warning
            return torch.sparse_coo_tensor(row_N[None], values_ND, ctx.size), None, None, None, None


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
    if not len(anchor_CD) or not len(labels_N):
        part = F.embedding(labels_N[:0], weight_XD, sparse=True).float().sum()
    else:
        part = _Aligned.apply(weight_XD, labels_N, anchor_CD, f_C, first_class)  # type: ignore[no-untyped-call]
    total: Tensor = SumOverRanks.apply(part, batch.group)  # type: ignore[no-untyped-call]
    return total
