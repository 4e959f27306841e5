"""Where k-means starts: random samples, k-means++, class means, or given centres. k-means|| is in `seeding_parallel`.

k-means++ (Arthur and Vassilvitskii, 2007) draws each centre from the rows with a chance in proportion to their
distance from the nearest centre drawn so far, here 1 - cos, half the squared Euclidean distance of unit rows. The draw
is a race: every row runs for a time -log(u) / distance, u a hash of (seed, round, row), and the first has won with that
chance. So every rank runs its own rows and one small all-reduce finds the winner, the same on any number of ranks. As
scikit-learn does, 2 + log K rows are drawn a round (the first of the race), and that which brings all rows nearest is
taken. Cosines are float64: rounding then has no say in who wins.

Legend: P rows of this rank, D embedding size, K clusters, S of this rank's shard, L candidates of a round, W ranks,
b rows of a block, Q rows chosen, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.together import InputError
from clustering.lloyd.sums import ClusterSums
from clustering.service.rows import Rows
from partial_fc.collectives import all_reduce_
from partial_fc.rounding import lots
from sharding import all_shards, shard_of

_BLOCK = {"cpu": 256, "cuda": 1 << 16}
_STEPS = 1 << 30
"""Of a distance in a sum over rows: 2^32 rows fit int64."""
_SAME = 5e-7
"""Rows no further from a centre than this are taken for copies of it: float32 rows are of unit length up to 1e-7."""


class Placed(NamedTuple):
    """Rows of this rank among those of all."""

    rows: Rows
    number_P: Tensor
    """int64: each row's number among those of all ranks; rising, and no rank's between another's."""
    weight_P: Tensor
    """float64: how many rows it stands for; 0 for a zero row."""


def placed(rows: Rows, first_row: int, device: torch.device) -> Placed:
    """A rank's contiguous range of rows. Reads them once, to find zero rows."""
    number_P = torch.arange(first_row, first_row + len(rows), device=device)
    weight_P = torch.empty(len(rows), dtype=torch.float64, device=device)
    for part in _blocks(len(rows), device):
        weight_P[part] = (rows.block(part.start, part.stop) != 0).any(1).double()
    return Placed(rows, number_P, weight_P)


def _blocks(rows: int, device: torch.device) -> list[slice]:
    size = _BLOCK[device.type]
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def uniform(number_P: Tensor, *, seed: int, turn: int) -> Tensor:
    """A number in (0, 1) for each row, float64 (P,): a pure function of (seed, turn, row)."""
    key = int(np.random.SeedSequence([seed, turn]).generate_state(1, np.uint32)[0])
    lots_P2 = lots(number_P, 2, key)
    return ((lots_P2[:, 0] << 20) + (lots_P2[:, 1] >> 12)).double().add_(0.5).mul_(2.0**-52)


def race(number_P: Tensor, mass_P: Tensor, count: int, group: dist.ProcessGroup, *, seed: int, turn: int) -> Tensor:
    """Numbers of the first `count` rows of all ranks, int64, the same on all; fewer when fewer have any mass.

    mass_P: float64, 0 or more. The first has won with a chance in proportion to its mass, the next with the same rule
    among the rest. One all-reduce of W x count x 2 float64.
    """
    time_P = torch.where(mass_P > 0, -uniform(number_P, seed=seed, turn=turn).log() / mass_P, math.inf)
    least_Q, place_Q = time_P.topk(min(count, len(time_P)), largest=False)
    table_WQ2 = least_Q.new_zeros(dist.get_world_size(group), count, 2)
    own_Q2 = table_WQ2[dist.get_rank(group), : len(least_Q)]
    own_Q2[:, 0] = least_Q
    own_Q2[:, 1] = (number_P[place_Q] + 1).double()  # 0: an empty place
    entry_X2 = all_reduce_(table_WQ2, group).flatten(0, 1)
    entry_X2 = entry_X2[(entry_X2[:, 1] > 0) & entry_X2[:, 0].isfinite()]
    entry_X2 = entry_X2[entry_X2[:, 0].argsort(stable=True)[:count]]
    return entry_X2[:, 1].long() - 1


def placed_sum(mass_P: Tensor, group: dist.ProcessGroup) -> float:
    """Sum over the rows of all ranks in steps of 2^-30: exact, the same on any number of ranks. One all-reduce."""
    return int(all_reduce_((mass_P * _STEPS).round().long().sum(), group)) / _STEPS


def fetch(place: Placed, number_Q: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows by their numbers, float32 (Q, D), on every rank. One all-reduce."""
    found_QD = torch.zeros(len(number_Q), place.rows.dim, device=number_Q.device)
    if len(place.number_P):
        at_Q = torch.searchsorted(place.number_P, number_Q).clamp_max(len(place.number_P) - 1)
        mine_Q = place.number_P[at_Q] == number_Q
        found_QD[mine_Q] = place.rows.take(at_Q[mine_Q]).float()
    return all_reduce_(found_QD, group)


def random_rows(place: Placed, num_clusters: int, group: dist.ProcessGroup, *, seed: int) -> Tensor:
    """Distinct rows drawn at random, this rank's shard of them, float32 (S, D).

    Raises InputError on all ranks when there are fewer distinct rows than clusters. Collectives: two all-reduces, more
    where rows were drawn that are equal; the second has the size of all centres.
    """
    count = num_clusters
    while True:
        number_Q = race(place.number_P, (place.weight_P > 0).double(), count, group, seed=seed, turn=0)
        if len(number_Q) >= num_clusters:
            first_Q = _first_of_equals(_fingerprints(place, number_Q, group))
            if int(first_Q.sum()) >= num_clusters:
                number_K = number_Q[first_Q][:num_clusters]
                return shard_of_rows(place, number_K, group)
        if len(number_Q) < count:
            found = len(number_Q) and int(_first_of_equals(_fingerprints(place, number_Q, group)).sum())
            raise too_few(num_clusters, found)
        count *= 2


def too_few(num_clusters: int, found: int) -> InputError:
    """K is more than there are distinct rows with a direction."""
    return InputError(
        f"--k {num_clusters}: expected at most as many clusters as there are distinct embeddings other than zero, got "
        f"{found} of these: use a smaller --k"
    )


def _fingerprints(place: Placed, number_Q: Tensor, group: dist.ProcessGroup) -> Tensor:
    """int64 (Q,): equal for equal rows. One all-reduce."""
    hash_Q = torch.zeros_like(number_Q)
    if len(place.number_P):
        at_Q = torch.searchsorted(place.number_P, number_Q).clamp_max(len(place.number_P) - 1)
        mine_Q = (place.number_P[at_Q] == number_Q).nonzero()[:, 0]
        column_D = torch.arange(1, place.rows.dim + 1, device=number_Q.device)
        odd_D = ((column_D * 0x9E3779B97F4A7C1) ^ (column_D << 7)) | 1
        for part_q in mine_Q.split(_BLOCK[number_Q.device.type]):
            x_qD = place.rows.take(at_Q[part_q]).float() + 0.0  # no -0
            hash_Q[part_q] = (x_qD.view(torch.int32).long() * odd_D).sum(1)
    return all_reduce_(hash_Q, group)


def _first_of_equals(hash_Q: Tensor) -> Tensor:
    sorted_Q, order_Q = hash_Q.sort(stable=True)
    new_Q = torch.ones_like(sorted_Q, dtype=torch.bool)
    new_Q[1:] = sorted_Q[1:] != sorted_Q[:-1]
    return torch.empty_like(new_Q).scatter_(0, order_Q, new_Q)


def shard_of_rows(place: Placed, number_K: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of rows by their numbers, float32 (S, D). One all-reduce a shard: no rank holds all."""
    rank, shards = dist.get_rank(group), all_shards(dist.get_world_size(group), len(number_K))
    own_SD = torch.empty(0, place.rows.dim, device=number_K.device)
    for source, shard in enumerate(shards):
        shown_SD = fetch(place, number_K[shard.start : shard.stop], group)
        if source == rank:
            own_SD = shown_SD
    return own_SD


def plus_plus(place: Placed, num_clusters: int, group: dist.ProcessGroup, *, seed: int) -> Tensor:
    """k-means++ with greedy candidates: this rank's shard of the centres, float32 (S, D).

    Reads all rows num_clusters times. Raises InputError on all ranks when only copies of centres are left.
    Collectives: three small all-reduces a round.
    """
    device = place.weight_P.device
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), num_clusters)
    centres_SD = torch.zeros(own.size, place.rows.dim, device=device)
    distance_P = torch.ones_like(place.weight_P)
    for number in range(num_clusters):
        count = 1 if number == 0 else 2 + int(math.log(num_clusters))
        number_L = race(place.number_P, place.weight_P * distance_P, count, group, seed=seed, turn=number)
        if not len(number_L):
            raise too_few(num_clusters, number)
        x_LD = fetch(place, number_L, group)
        distance_PL = _distances(place, x_LD)
        if number:
            distance_PL = distance_PL.minimum(distance_P[:, None])
        left_L = ((place.weight_P[:, None] * distance_PL) * _STEPS).round().long().sum(0)
        best = int(all_reduce_(left_L, group).argmin())
        distance_P = distance_PL[:, best].contiguous()
        if own.start <= number < own.stop:
            centres_SD[number - own.start] = x_LD[best]
    return centres_SD


def _distances(place: Placed, x_LD: Tensor) -> Tensor:
    """1 - cos of every row of this rank to each of the given ones, float64 (P, L), 0 for copies."""
    distance_PL = torch.empty(len(place.number_P), len(x_LD), dtype=torch.float64, device=x_LD.device)
    columns_DL = x_LD.double().T.contiguous()
    buffer_bD = columns_DL.new_empty(_BLOCK[x_LD.device.type], place.rows.dim)  # once: new pages are slow
    for part in _blocks(len(distance_PL), x_LD.device):
        x_bD = buffer_bD[: part.stop - part.start].copy_(place.rows.block(part.start, part.stop))
        torch.mm(x_bD, columns_DL, out=distance_PL[part])
    distance_PL.neg_().add_(1)
    return distance_PL.masked_fill_(distance_PL < _SAME, 0.0)


def class_means(rows: Rows, class_P: Tensor, num_clusters: int, *, total: int, group: dist.ProcessGroup) -> Tensor:
    """Cluster k starts at the unit mean of class k, this rank's shard, float32 (S, D); a zero row where it has none.

    class_P: int64, -1: none. total: rows of all ranks. Collectives: one reduce of (S, D) a rank, one all-reduce of K.
    """
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), num_clusters)
    sums = ClusterSums(
        num_clusters=num_clusters, dim=rows.dim, points=total, group=group, device=class_P.device
    )  # fmt: skip
    sums.move_(rows, torch.arange(len(rows), device=class_P.device), torch.full_like(class_P, -1), class_P)
    counts_K = all_reduce_(torch.bincount(class_P[class_P >= 0], minlength=num_clusters), group)
    zeros_SD = torch.zeros(own.size, rows.dim, device=class_P.device)
    return sums.unit_means(counts_K[own.start : own.stop], zeros_SD)
