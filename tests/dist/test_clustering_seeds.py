"""Seeds of empty clusters over ranks, counted level by level, against the readable step of `clustering.kmeans`."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from clustering.kmeans import FIT_LEVELS, WELL_FITTED, seeds
from clustering.service.seeds import LEVELS, Order, buffer_bytes, empty_clusters, exchanges, nth_empty
from clustering.service.seeds import worst_of_each_class as worst
from sharding import shard_of
from tests.ranks import WORLD_SIZES, RankPool

_DRAWS = 20


def _draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Cosines with many ties, clusters, classes in ascending order, which points count; C and K."""
    draw = random.Random(seed)
    classes, clusters = draw.choice([1, 2, 3, 40, 151, 151]), draw.choice([1, 30, 200, 200])
    points = draw.choice([0, 1, classes, 5 * classes, 5 * classes])
    some = [draw.uniform(-1, 1) for _ in range(draw.choice([1, 3, 50]))]
    edges = [-1.0, 1.0, WELL_FITTED / FIT_LEVELS, (WELL_FITTED - 1) / FIT_LEVELS, 0.5 / FIT_LEVELS, -1e-9]
    best = [draw.choice(some if draw.random() < 0.8 else edges) for _ in range(points)]
    crowded = range(draw.randint(1, clusters))  # the others are empty, and some of these
    index = [draw.choice(crowded) if draw.random() < 0.9 else -1 for _ in range(points)]
    counted = [k >= 0 and draw.random() < 0.8 for k in index]
    labels = sorted(draw.randrange(classes) for _ in range(points))
    numbers = [torch.tensor(column, dtype=torch.int64) for column in (index, labels)]
    return (
        torch.tensor(best, dtype=torch.float64),
        *numbers,  # type: ignore[return-value]
        torch.tensor(counted, dtype=torch.bool),
        classes,
        clusters,
    )


def _seeded(group: dist.ProcessGroup, number: int) -> list[tuple[int, int]]:
    """(point, cluster) of the seeds of this rank; points are numbered over all ranks."""
    best_N, index_N, class_N, counted_N, C, K = _draw(number)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own = shard_of(rank, ranks, C)
    own_P = ((class_N >= own.start) & (class_N < own.stop)).nonzero()[:, 0]
    counts_K = torch.bincount(index_N[counted_N], minlength=K)
    # One reduce-scatter of all levels, three, or many.
    order = Order(group, torch.device("cpu"), numbers=[1 << 22, 50_000 * ranks, 30_001][number % 3])
    point_Q, level_Q = worst(best_N[own_P], counted_N[own_P], class_N[own_P])
    for _ in range(2):  # what a seeding leaves behind does not show in the next one
        order.clear_()
        order.count_(level_Q)
        order.exchange_()
        place_Q = order.places(level_Q)
    chosen_Q = place_Q < empty_clusters(counts_K)
    return list(zip(own_P[point_Q[chosen_Q]].tolist(), nth_empty(counts_K, place_Q[chosen_Q]).tolist(), strict=True))


def _all_seeded(group: dist.ProcessGroup) -> list[list[tuple[int, int]]]:
    return [_seeded(group, number) for number in range(_DRAWS)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_readable_seeding(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _all_seeded)
    planted = 0
    for number in range(_DRAWS):
        best_N, index_N, class_N, counted_N, _, K = _draw(number)
        expected = seeds(best_N, index_N, class_N, counted_N, K)
        assert sorted(pair for part in parts for pair in part[number]) == sorted(expected), number
        planted += len(expected)
    assert planted > 200


def _left_out(group: dist.ProcessGroup) -> list[int]:
    """Rank 0 has counted nothing, as one that failed."""
    order = Order(group, torch.device("cpu"))
    level_Q = torch.tensor([5, -3, 5])
    if dist.get_rank(group):
        order.count_(level_Q)
    order.exchange_()
    return order.places(level_Q).tolist() if dist.get_rank(group) else []


def test_a_rank_without_candidates_leaves_the_places_to_the_others(ranks: RankPool) -> None:
    assert ranks.run(2, _left_out) == [[], [1, 0, 2]]


@pytest.mark.parametrize("world", [1, 2, 7, 64, 1024, 100_000])
def test_buffers_do_not_grow_with_ranks(world: int) -> None:
    times, width = exchanges(world)
    assert times * width >= LEVELS > times * width - times
    assert buffer_bytes(world) < 19e6
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    try:
        assert dist.group.WORLD is not None
        order = Order(dist.group.WORLD, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert sum(t.nbytes for t in vars(order).values() if isinstance(t, Tensor)) == buffer_bytes(world)


def test_the_nth_empty_cluster_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clustering.service.seeds.CLUSTERS_AT_ONCE", 7)
    counts_K = torch.randint(0, 3, (100,))
    empty_E = (counts_K == 0).nonzero()[:, 0]
    place_Q = torch.randperm(len(empty_E))[:20]
    assert empty_clusters(counts_K) == len(empty_E)
    assert torch.equal(nth_empty(counts_K, place_Q), empty_E[place_Q])
    assert nth_empty(counts_K + 1, place_Q[:0]).shape == (0,)
