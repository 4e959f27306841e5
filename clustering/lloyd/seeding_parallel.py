"""k-means|| (Bahmani et al., 2012, arXiv 1203.6402): few rounds that draw many candidates each, then k-means++ of them.

A round draws every row by itself with the chance l w d / phi, at most 1: w its weight, d its distance from the nearest
candidate so far (1 - cos), phi the sum of w d over all rows, l = 2 K. After three rounds each candidate weighs as many
rows as are nearest to it, and k-means++ of the weighted candidates gives the centres. It reads all rows once a round
instead of K times, yet compares them with 6 K candidates: about as much as six full iterations.

Legend: P rows of this rank, M candidates of all ranks, m of a round, D embedding size, S centres of this rank's shard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.together import InputError
from clustering.lloyd.lloyd import Lloyd
from clustering.lloyd.seeding import Placed, placed_sum, plus_plus, race, shard_of_rows, too_few, uniform
from clustering.service.rows import TensorRows
from partial_fc.collectives import all_reduce_

ROUNDS = 3
OVERSAMPLING = 2
_TURNS = 1 << 40
"""Turns of the hash from here on are k-means||'s, those before k-means++'s."""


def parallel_plus_plus(place: Placed, num_clusters: int, group: dist.ProcessGroup, *, seed: int) -> Tensor:
    """This rank's shard of the centres, float32 (S, D).

    place: as `seeding.placed` gives it. Raises InputError on all ranks when there are fewer distinct rows than
    clusters. Collectives: those of `Lloyd.assign` and four all-reduces a round, and those of `plus_plus`.
    """
    new_m = race(place.number_P, (place.weight_P > 0).double(), 1, group, seed=seed, turn=_TURNS)
    if not len(new_m):
        raise too_few(num_clusters, 0)
    number_M, distance_P, nearest_P = new_m[:0], torch.full_like(place.weight_P, 2.0), torch.zeros_like(place.number_P)
    for turn in range(ROUNDS + 1):
        if len(new_m):
            found_P, at_P = _nearest(place, new_m, group)
            nearer_P = found_P < distance_P
            nearest_P = torch.where(nearer_P, at_P + len(number_M), nearest_P)
            distance_P = torch.where(nearer_P, found_P, distance_P)
            number_M = torch.cat([number_M, new_m])
        if turn < ROUNDS:
            new_m = _draw(place, distance_P, OVERSAMPLING * num_clusters, group, seed=seed, turn=_TURNS + 1 + turn)
    try:
        return plus_plus(_candidates(place, number_M, nearest_P, group), num_clusters, group, seed=seed)
    except InputError:  # too few distinct candidates: rows may still be there
        return plus_plus(place, num_clusters, group, seed=seed)


def _nearest(place: Placed, number_m: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of these rows, float64 (P,), and its place among them, int64."""
    lloyd = Lloyd(
        place.rows,
        centres_SD=shard_of_rows(place, number_m, group),
        num_clusters=len(number_m),
        group=group,
        first_row=int(place.number_P[0]) if len(place.number_P) else 0,
        bounds=False,
    )
    lloyd.assign()
    return (1 - lloyd.best_P).clamp(0, 2), lloyd.index_P.clamp_min(0)


def _draw(
    place: Placed, distance_P: Tensor, expected: int, group: dist.ProcessGroup, *, seed: int, turn: int
) -> Tensor:
    """Numbers of the rows drawn on all ranks, int64 (m,), rising. Three all-reduces."""
    mass_P = place.weight_P * distance_P
    phi = placed_sum(mass_P, group)
    if phi <= 0:
        return place.number_P[:0]
    drawn_P = uniform(place.number_P, seed=seed, turn=turn) < expected * mass_P / phi
    own_q = place.number_P[drawn_P]
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=own_q.device)
    counts[dist.get_rank(group)] = len(own_q)
    ends = all_reduce_(counts, group).cumsum(0).tolist()
    table_m = own_q.new_zeros(ends[-1])
    end = ends[dist.get_rank(group)]
    table_m[end - len(own_q) : end] = own_q
    return all_reduce_(table_m, group)


def _candidates(place: Placed, number_M: Tensor, nearest_P: Tensor, group: dist.ProcessGroup) -> Placed:
    """The candidates that are rows of this rank, each with the weight of the rows nearest to it. One all-reduce."""
    weight_M = torch.zeros(len(number_M), dtype=torch.float64, device=number_M.device)
    weight_M.index_add_(0, nearest_P, place.weight_P)  # whole numbers: exact in any order
    all_reduce_(weight_M, group)
    at_M = torch.searchsorted(place.number_P, number_M).clamp_max(max(0, len(place.number_P) - 1))
    mine_M = place.number_P[at_M] == number_M if len(place.number_P) else torch.zeros_like(number_M, dtype=torch.bool)
    order_Q = number_M[mine_M].argsort()
    rows_QD = place.rows.take(at_M[mine_M][order_Q])
    return Placed(TensorRows(rows_QD), number_M[mine_M][order_Q], weight_M[mine_M][order_Q])
