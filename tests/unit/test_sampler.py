"""Order: an exact permutation each epoch, cut the same way for any number of ranks; flips that follow the sample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.errors import DataError
from data.loading.transforms import flips
from data.order.sampler import BatchPlan, EpochOrder

FROZEN_ORDER = [8, 5, 1, 9, 6, 7, 4, 0, 2, 3]
FROZEN_FLIPS = [0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0]


def _order(n: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return EpochOrder(n, seed=seed).samples(epoch, np.arange(n))


def test_every_small_set_is_covered_exactly() -> None:
    for n, epoch in itertools.product(range(1, 200), range(3)):
        assert sorted(_order(n, epoch=epoch).tolist()) == list(range(n))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(200, 200_000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_large_sets_are_covered_exactly(n: int, seed: int, epoch: int) -> None:
    assert (np.bincount(_order(n, seed=seed, epoch=epoch), minlength=n) == 1).all()


def test_positions_may_be_asked_for_one_by_one_in_a_set_of_any_size() -> None:
    n = 42_474_557 * 1000
    order = EpochOrder(n, seed=3)
    positions = np.array([[0, 1], [n - 1, n // 2]])
    samples = order.samples(5, positions)
    assert samples.shape == positions.shape
    assert samples.dtype == np.int64
    assert len(set(samples.ravel().tolist())) == 4
    assert samples.min() >= 0
    assert samples.max() < n
    assert samples[1, 0] == order.samples(5, np.array([n - 1]))[0]
    for outside in (-1, n):
        with pytest.raises(IndexError, match="not within"):
            order.samples(0, np.array([outside]))


def test_this_very_order_is_kept_from_release_to_release() -> None:
    """A checkpoint resumes in the middle of an order: changing it changes what a resumed epoch sees."""
    assert _order(10, seed=1, epoch=2).tolist() == FROZEN_ORDER
    assert flips(np.arange(16), seed=1, epoch=2).astype(int).tolist() == FROZEN_FLIPS


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 10, 16, 17])
def test_all_pairs_of_samples_are_equally_likely_at_all_pairs_of_places(n: int) -> None:
    """Also in tiny sets. (All n! orders are not: the parity of a Feistel permutation is fixed.)"""
    orders = np.stack([_order(n, seed=11, epoch=epoch) for epoch in range(2000)])
    for first, second in [(0, 1), (1, 0), (n - 1, 0), (n // 2, n - 1)]:
        if first != second:
            pairs = np.zeros((n, n), int)
            np.add.at(pairs, (orders[:, first], orders[:, second]), 1)
            assert not pairs.diagonal().any()
            assert chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-5


def test_neighbours_scatter_and_places_are_uniform() -> None:
    n = 10_007
    order = _order(n, seed=5)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, _order(n, seed=5, epoch=1))[0, 1]) < 0.05
    table = np.histogram2d(np.arange(n), order, bins=20)[0]
    assert chisquare(table.ravel()).pvalue > 1e-4
    fixed = [int((_order(101, seed=seed) == np.arange(101)).sum()) for seed in range(300)]
    assert abs(np.mean(fixed) - 1) < 0.25  # a uniform permutation has one fixed point on average


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(8, 500),
    per_rank=st.integers(1, 2),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 5),
)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(n: int, per_rank: int, seed: int, epoch: int) -> None:
    total = 4 * per_rank
    batches = {}
    for world_size in (1, 2, 4):
        plans = [
            BatchPlan(n, batch_size=total // world_size, rank=rank, world_size=world_size, seed=seed)
            for rank in range(world_size)
        ]
        assert {plan.steps_per_epoch for plan in plans} == {n // total}
        batches[world_size] = [
            np.concatenate([plan.samples(epoch, start) for plan in plans]).tolist() for start in plans[0].starts()
        ]
    assert batches[1] == batches[2] == batches[4]
    seen = [sample for batch in batches[1] for sample in batch]
    assert len(seen) == len(set(seen)) == n // total * total


@pytest.mark.parametrize("per_rank", [7, None])
def test_1_2_4_and_1_ranks_go_on_with_the_same_sequence(per_rank: int | None) -> None:
    """With as many images a rank, so that the global batch changes; and with as many in all."""
    n, start, seen = 1003, 0, []
    for world_size, steps in ((1, 9), (2, 11), (4, 5), (1, 3)):
        plans = [
            BatchPlan(n, batch_size=per_rank or 28 // world_size, rank=rank, world_size=world_size, seed=4)
            for rank in range(world_size)
        ]
        for begin in plans[0].starts(start)[:steps]:
            seen += np.concatenate([plan.samples(2, begin) for plan in plans]).tolist()
            start = begin + plans[0].global_batch
        assert start == len(seen)
    assert seen == EpochOrder(n, seed=4).samples(2, np.arange(len(seen))).tolist()
    assert len(seen) == ((9 + 22 + 20 + 3) * 7 if per_rank else 28 * 28)


def test_each_epoch_drops_another_tail() -> None:
    plan = BatchPlan(103, batch_size=10, rank=0, world_size=1, seed=0)
    seen = [
        frozenset(np.concatenate([plan.samples(epoch, start) for start in plan.starts()]).tolist())
        for epoch in range(6)
    ]
    assert len(set(seen)) == 6


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"2 rank\(s\) x 100 images = 200 a step, but an epoch has 192 images: lower"):
        BatchPlan(192, batch_size=100, rank=0, world_size=2, seed=0)
    for rank, world_size, batch_size in [(2, 2, 1), (-1, 2, 1), (0, 1, 0)]:
        with pytest.raises(DataError, match="0 <= rank < world_size"):
            BatchPlan(192, batch_size=batch_size, rank=rank, world_size=world_size, seed=0)
    with pytest.raises(DataError, match="at least one sample"):
        EpochOrder(0, seed=0)
    plan = BatchPlan(192, batch_size=10, rank=0, world_size=1, seed=0)
    for start in (-1, 193):
        with pytest.raises(DataError, match="expected to begin at 0 to 192 images"):
            plan.starts(start)
    assert list(plan.starts(183)) == []


def test_flips_follow_the_sample_and_change_with_the_epoch() -> None:
    samples = np.arange(20_000)
    first, second = (flips(samples, seed=7, epoch=epoch) for epoch in (0, 1))
    assert first.dtype == np.bool_
    for mirrored in (first, second, first ^ second, first[1:] ^ first[:-1]):
        assert abs(mirrored.mean() - 0.5) < 0.02  # five standard deviations
    some = np.random.default_rng(0).permutation(samples)[:100]
    assert (flips(some, seed=7, epoch=0) == first[some]).all()
    assert (flips(samples, seed=8, epoch=0) != first).any()
