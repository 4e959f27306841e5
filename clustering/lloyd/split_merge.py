"""Out of poor local optima: clusters worth least are merged, and those worth most are split in their place.

Full iterations of k-means move centres only a little: where two centres share one dense group and a third serves two
groups, they stay. With unit rows the objective (the sum of the cosines) of a fixed assignment is the sum over clusters
of |s_k|, the length of the sum of the members. So both moves are priced exactly:

    merging a and b loses |s_a| + |s_b| - |s_a + s_b|        splitting k into p and q gains |s_p| + |s_q| - |s_k|

The halves are found by k-means of two centres inside every cluster, from its worst-fitted member and the member least
like that one. Merges are taken from the least loss up, splits from the largest gain down, in pairs, each cluster at
most once, as long as the gain is more than the loss. So every pair raises the objective, and iterations raise it
further. A pass reads all rows a few times, which costs little beside comparing them with many centres. That centres
should move to where they are of more use is an old idea; "breathing" k-means (arXiv 2006.15666) is one way, this is
ours.

Sums and lengths are exact (fixed point) and cosines are taken pair by pair: the result is the same on any number of
ranks.

Legend: P rows of this rank, Q of one shard's clusters, D embedding size, K clusters, S of a shard, J pairs, b rows of
a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import FIT_LEVELS, fit_level
from clustering.lloyd.repair import gather_rows
from clustering.nearest.float64_rows import row_dots
from clustering.service.rows import Rows
from clustering.service.shards import FIXED_ONE, show_rows
from partial_fc.collectives import all_reduce_
from sharding import Shard, all_shards

_INNER = 4
"""Iterations inside a cluster."""
_STEPS = 1 << 30
"""Of a cosine in a sum over rows, and of a gain or loss."""
_LEAST = 1e-3
"""What a pair must gain, in cosines of a single row."""
_BLOCK = {"cpu": 256, "cuda": 1 << 16}
_ROW_BITS = 40
_NOBODY = torch.iinfo(torch.int64).max
_COLUMNS = 2048
_AT_ONCE = 1 << 14  # pairs whose rows are on every rank at a time


class _Split(NamedTuple):
    """Every cluster of a shard, and its halves."""

    length_S: Tensor
    """float64: |s_k|."""
    first_SD: Tensor
    second_SD: Tensor
    halves_length_S: Tensor
    """float64: |s_p| + |s_q|; -inf where a half is empty."""


@torch.no_grad()
def split_and_merge(
    rows: Rows, index_P: Tensor, centres_SD: Tensor, num_clusters: int, group: dist.ProcessGroup, *, first_row: int
) -> tuple[Tensor, int]:
    """(new centres_SD, pairs): this rank's shard with pairs of clusters merged and others split in their place.

    index_P: int64, the cluster of each row, -1: none. centres_SD: float32, the unit means of these clusters; of one
    without members, any row. Both are left as they are. Collectives: for each rank three broadcasts of (S, D) float32,
    two all-reduces of (S, D) float32, four of (2 S, D) int64; some of K int64; the rows of the pairs.
    """
    shards = all_shards(dist.get_world_size(group), num_clusters)
    rank = dist.get_rank(group)
    found = []
    halves = None
    for source, shard in enumerate(shards):
        shown_SD = show_rows(centres_SD, shard, source, group)
        split = _split(rows, index_P, shown_SD, shard, group, first_row=first_row)
        found.append((split.length_S, split.halves_length_S - split.length_S))
        if source == rank:
            halves = split
    assert halves is not None
    length_K, gain_K = (torch.cat(parts) for parts in zip(*found, strict=True))
    counts_K = all_reduce_(torch.bincount(index_P[index_P >= 0], minlength=num_clusters), group)
    loss_K, partner_K = _cheapest_merges(centres_SD, length_K, counts_K, shards, group)
    pairs = choose(loss_K.cpu().numpy(), partner_K.cpu().numpy(), gain_K.cpu().numpy())
    new_SD = centres_SD.clone()
    for start in range(0, len(pairs), _AT_ONCE):
        _carry_out_(new_SD, centres_SD, halves, length_K, pairs[start : start + _AT_ONCE], shards[rank], group)
    return new_SD, len(pairs)


def _blocks(rows: Rows, point_Q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part_b in point_Q.split(_BLOCK[point_Q.device.type]):
        if len(part_b):
            yield part_b, rows.take(part_b)


def _dots(rows: Rows, point_Q: Tensor, other_SD: Tensor, cluster_Q: Tensor) -> Tensor:
    """Of each of these rows with the row of its cluster, float32 on CPUs, float64 on GPUs (Q,).

    A pair has the same bits whatever other pairs there are.
    """
    parts = [other_SD.new_empty(0)]
    at = 0
    for part_b, x_bD in _blocks(rows, point_Q):
        cluster_b = cluster_Q[at : at + len(part_b)]
        at += len(part_b)
        if x_bD.is_cuda:
            parts.append(row_dots(x_bD, torch.arange(len(x_bD), device=x_bD.device), other_SD, cluster_b))
        else:
            parts.append((other_SD.index_select(0, cluster_b) * x_bD).sum(1))  # row by row on CPUs
    return torch.cat(parts)


def _sum_by(cluster_Q: Tensor, value_Q: Tensor, clusters: int, group: dist.ProcessGroup) -> Tensor:
    """Sum of the values of each cluster over all ranks in steps of 2^-30: exact. float64."""
    steps_Q = (value_Q.double() * _STEPS).round().long()
    sums = torch.zeros(clusters, dtype=torch.int64, device=value_Q.device).index_add_(0, cluster_Q, steps_Q)
    return all_reduce_(sums, group).double() / _STEPS


def _members(index_P: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Rows of this rank in the shard's clusters, and these counted from 0."""
    point_Q = ((index_P >= shard.start) & (index_P < shard.stop)).nonzero()[:, 0]
    return point_Q, index_P[point_Q] - shard.start


def _split(
    rows: Rows, index_P: Tensor, centres_SD: Tensor, shard: Shard, group: dist.ProcessGroup, *, first_row: int
) -> _Split:
    """k-means of two centres inside every cluster of a shard."""
    point_Q, cluster_Q = _members(index_P, shard)
    cosine_Q = _dots(rows, point_Q, centres_SD, cluster_Q)
    length_S = _sum_by(cluster_Q, cosine_Q, shard.size, group)  # cosines to the unit mean add up to it
    worst = _least(cosine_Q, first_row + point_Q, cluster_Q, shard.size, group)
    first_SD = gather_rows(rows, worst, first_row=first_row, group=group)
    cosine_Q = _dots(rows, point_Q, first_SD, cluster_Q)
    other = _least(cosine_Q, first_row + point_Q, cluster_Q, shard.size, group)
    second_SD = gather_rows(rows, other, first_row=first_row, group=group)
    sums_XD = torch.zeros(2 * shard.size, rows.dim, dtype=torch.int64, device=centres_SD.device)
    half_Q = torch.full_like(cluster_Q, -1)
    for _ in range(_INNER):
        difference_SD = (first_SD.double() - second_SD).float()
        new_Q = 2 * cluster_Q + (_dots(rows, point_Q, difference_SD, cluster_Q) < 0)
        _move_(sums_XD, rows, point_Q, half_Q, new_Q, group)
        half_Q = new_Q
        mean_XD = _unit(sums_XD)
        first_SD, second_SD = mean_XD[0::2], mean_XD[1::2]
    cosine_Q = _dots(rows, point_Q, mean_XD.float(), half_Q)
    length_S2 = _sum_by(half_Q, cosine_Q, 2 * shard.size, group).view(-1, 2)
    whole_S = (sums_XD.view(-1, 2, rows.dim) == 0).all(2).any(1)
    halves_length_S = length_S2.sum(1).masked_fill(whole_S, float("-inf"))
    return _Split(length_S, first_SD.float(), second_SD.float(), halves_length_S)


def _least(cosine_Q: Tensor, number_Q: Tensor, cluster_Q: Tensor, clusters: int, group: dist.ProcessGroup) -> Tensor:
    """The number of the row of least cosine in each cluster, int64 (S,), -1 for a cluster without rows.

    The first of equals on the coarse grid of k-means. One all-reduce.
    """
    key_S = torch.full((clusters,), _NOBODY, dtype=torch.int64, device=number_Q.device)
    key_Q = ((fit_level(cosine_Q) + FIT_LEVELS) << _ROW_BITS) + number_Q
    all_reduce_(key_S.scatter_reduce_(0, cluster_Q, key_Q, "amin"), group, dist.ReduceOp.MIN)
    return torch.where(key_S == _NOBODY, -1, key_S & ((1 << _ROW_BITS) - 1))


def _move_(
    sums_XD: Tensor, rows: Rows, point_Q: Tensor, old_Q: Tensor, new_Q: Tensor, group: dist.ProcessGroup
) -> None:
    """Take rows from the sums of their old halves (-1: none) and add them to the new ones'. One all-reduce."""
    change_XD = torch.zeros_like(sums_XD)
    moved_q = (old_Q != new_Q).nonzero()[:, 0]
    at = 0
    for part_b, x_bD in _blocks(rows, point_Q[moved_q]):
        here_b = moved_q[at : at + len(part_b)]
        fixed_bD = (x_bD.double() * FIXED_ONE).round_().long()
        had_b = old_Q[here_b] >= 0
        change_XD.index_add_(0, new_Q[here_b], fixed_bD)
        change_XD.index_add_(0, old_Q[here_b][had_b], fixed_bD[had_b], alpha=-1)
        at += len(part_b)
    sums_XD += all_reduce_(change_XD, group)


def _unit(sums_XD: Tensor) -> Tensor:
    """Rows of fixed point scaled to unit length, float64; a zero row stays."""
    value_XD = sums_XD.double()
    row_X = torch.arange(len(value_XD), device=value_XD.device)
    length_X1 = row_dots(value_XD, row_X, value_XD, row_X).sqrt()[:, None]
    return torch.where(length_X1 > 0, value_XD / length_X1, 0.0)


def _cheapest_merges(
    centres_SD: Tensor, length_K: Tensor, counts_K: Tensor, shards: list[Shard], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The least that merging each cluster with another loses, float64 (K,), and that other, int64.

    An empty cluster loses nothing and has itself for a partner: it is free. Collectives: one broadcast a rank, one
    all-reduce.
    """
    own = shards[dist.get_rank(group)]
    own_length_S1 = length_K[own.start : own.stop, None]
    best_S = torch.full((own.size,), _NOBODY, dtype=torch.int64, device=centres_SD.device)
    partner_S = torch.arange(own.start, own.stop, device=centres_SD.device)
    own_S1 = partner_S[:, None].clone()
    for source, shard in enumerate(shards):
        shown_SD = show_rows(centres_SD, shard, source, group).double()
        for left in range(shard.start, shard.stop, _COLUMNS):
            right = min(left + _COLUMNS, shard.stop)
            other_c = torch.arange(left, right, device=centres_SD.device)
            columns_cD = shown_SD[left - shard.start : right - shard.start]
            for top in range(0, own.size, _COLUMNS):
                part = slice(top, top + _COLUMNS)
                a_n1, b_c = own_length_S1[part], length_K[left:right]
                both_nc = a_n1.square() + b_c.square() + 2 * a_n1 * b_c * (centres_SD[part].double() @ columns_cD.T)
                steps_nc = ((a_n1 + b_c - both_nc.clamp_min(0).sqrt()) * _STEPS).round().long()
                steps_nc.masked_fill_((own_S1[part] == other_c) | (counts_K[left:right] == 0), _NOBODY)
                least_n, at_n = steps_nc.min(1)
                better_n = least_n < best_S[part]  # ties stay with the smaller cluster
                partner_S[part] = torch.where(better_n, at_n + left, partner_S[part])
                best_S[part] = torch.where(better_n, least_n, best_S[part])
    free_S = counts_K[own.start : own.stop] == 0
    table_2K = torch.zeros(2, len(length_K), dtype=torch.int64, device=centres_SD.device)
    table_2K[0, own.start : own.stop] = best_S.masked_fill(free_S, 0)
    table_2K[1, own.start : own.stop] = torch.where(free_S, own_S1[:, 0], partner_S)
    steps_K, partner_K = all_reduce_(table_2K, group)
    return steps_K.double() / _STEPS, partner_K


def choose(
    loss_K: npt.NDArray[np.float64], partner_K: npt.NDArray[np.int64], gain_K: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """(J, 3): clusters a and b that become one, and c that is split between b's place and its own. a = b: a free place.

    No cluster is in two pairs; ties go to the smaller cluster.
    """
    splits = iter(np.argsort(-gain_K, kind="stable").tolist())
    used = np.zeros(len(loss_K), dtype=bool)
    pairs: list[tuple[int, int, int]] = []
    for a in np.argsort(loss_K, kind="stable").tolist():
        b = int(partner_K[a])
        if used[a] or used[b]:
            continue
        c = next((k for k in splits if not used[k] and k not in (a, b)), None)
        if c is None or not gain_K[c] > loss_K[a] + _LEAST:
            break
        used[[a, b, c]] = True
        pairs.append((a, b, c))
    return np.array(pairs, dtype=np.int64).reshape(-1, 3)


def _carry_out_(
    new_SD: Tensor,
    centres_SD: Tensor,
    halves: _Split,
    length_K: Tensor,
    pairs_J3: npt.NDArray[np.int64],
    own: Shard,
    group: dist.ProcessGroup,
) -> None:
    """Write the centres of some pairs. One all-reduce of (4, J, D)."""
    a_J, b_J, c_J = torch.from_numpy(pairs_J3).to(centres_SD.device).T
    table_4JD = centres_SD.new_zeros(4, len(a_J), centres_SD.shape[1])
    sources = ((a_J, centres_SD), (b_J, centres_SD), (c_J, halves.first_SD), (c_J, halves.second_SD))
    for place_JD, (cluster_J, source_SD) in zip(table_4JD, sources, strict=True):
        here_J = (cluster_J >= own.start) & (cluster_J < own.stop)
        place_JD[here_J] = source_SD[cluster_J[here_J] - own.start]
    a_JD, b_JD, first_JD, second_JD = all_reduce_(table_4JD, group)
    sum_JD = a_JD.double() * length_K[a_J, None] + b_JD.double() * length_K[b_J, None]
    row_J = torch.arange(len(a_J), device=a_J.device)
    merged_JD = sum_JD / row_dots(sum_JD, row_J, sum_JD, row_J).sqrt()[:, None].clamp_min(1e-12)
    free_J1 = (a_J == b_J)[:, None]
    for cluster_J, row_JD in (
        (a_J, torch.where(free_J1, second_JD, merged_JD.float())),
        (b_J, second_JD),
        (c_J, first_JD),
    ):
        here_J = (cluster_J >= own.start) & (cluster_J < own.stop)
        new_SD[cluster_J[here_J] - own.start] = row_JD[here_J]
