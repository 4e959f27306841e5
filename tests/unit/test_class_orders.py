"""Orders by class: exact counts, nothing twice too early, groups of one identity, the same on any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.errors import DataError
from data.loading.loader import build_loader
from data.order.class_orders import BalancedOrder, ClassIndex, IdentityOrder
from data.order.sampler import BatchPlan, Order
from tests.image_cases import MemorySet, jpeg
from tests.plain_orders import by_class, plain_balanced, plain_identities

Make = Callable[[list[int], int], Order]

FROZEN_LABELS = [0, 0, 0, 0, 0, 7, 7, 3, 3, 3]
FROZEN_BALANCED = [[8, 6, 1, 7, 5, 2, 9, 5, 0, 3], [9, 6, 1, 4, 8, 5, 2, 7, 6, 3]]
FROZEN_IDENTITIES = [7, 9, 8, 7, 2, 4, 0, 3, 4, 0, 3, 1, 5, 6, 5, 6]

ODD = {
    "one sample": [0],
    "one class": [4] * 7,
    "classes of one image": list(range(9)),
    "empty classes": [5, 5, 2, 2, 2, 9],
    "one large class": [3] * 50 + [0, 1, 2, 2],
    "long tail, shuffled": np.random.default_rng(0).permutation(np.repeat(range(30), 60 // np.arange(1, 31))).tolist(),
    "equal classes": list(range(6)) * 8,
}
LABELS = st.one_of(st.sampled_from(list(ODD.values())), st.lists(st.integers(0, 12), min_size=1, max_size=120))


def _balanced(labels: list[int], seed: int = 0) -> BalancedOrder:
    return BalancedOrder(ClassIndex(np.array(labels)), seed=seed)


def _identities(labels: list[int], seed: int = 0, K: int = 4) -> IdentityOrder:
    return IdentityOrder(ClassIndex(np.array(labels)), images_per_identity=K, seed=seed)


BOTH = pytest.mark.parametrize("make", [_balanced, _identities])


def _epoch(order: Order, epoch: int = 0) -> list[int]:
    samples: list[int] = order.samples(epoch, np.arange(order.num_positions)).tolist()
    return samples


@settings(max_examples=40, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), K=st.integers(1, 9))
def test_both_are_what_a_plain_loop_gives(labels: list[int], seed: int, epoch: int, K: int) -> None:
    assert _epoch(_balanced(labels, seed), epoch) == plain_balanced(labels, seed, epoch)
    assert _epoch(_identities(labels, seed, K), epoch) == plain_identities(labels, seed, epoch, K)


# ---- balanced ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 100), epoch=st.integers(0, 9))
def test_balanced_counts_are_exact(labels: list[int], seed: int, epoch: int) -> None:
    """Every class once a round; so in an epoch each class comes floor or ceil of N / C times."""
    order = _balanced(labels, seed)
    samples = _epoch(order, epoch)
    classes = sorted(set(labels))
    assert order.num_positions == len(labels) == len(samples)
    for first in range(0, len(labels), len(classes)):
        drawn = [labels[sample] for sample in samples[first : first + len(classes)]]
        assert len(set(drawn)) == len(drawn)
    counts = [len(found) for found in by_class(labels, samples).values()]
    assert set(counts) <= {len(labels) // len(classes), math.ceil(len(labels) / len(classes))}


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 100), epoch=st.integers(0, 9))
def test_balanced_repeats_nothing_before_its_class_is_through(labels: list[int], seed: int, epoch: int) -> None:
    sizes = Counter(labels)
    for label, found in by_class(labels, _epoch(_balanced(labels, seed), epoch)).items():
        for first in range(0, len(found), sizes[label]):
            once = found[first : first + sizes[label]]
            assert len(set(once)) == len(once)


@settings(max_examples=30, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 100), sweep=st.integers(0, 3))
def test_balanced_reaches_every_image_in_as_few_epochs_as_can_be(labels: list[int], seed: int, sweep: int) -> None:
    order = _balanced(labels, seed)
    sizes = Counter(labels)
    rounds = len(labels) // len(sizes)
    longest = math.ceil(max(sizes.values()) / rounds)
    epochs = [by_class(labels, _epoch(order, epoch)) for epoch in range((sweep + 1) * longest)]
    for label, size in sizes.items():
        span = math.ceil(size / rounds)
        seen = {sample for found in epochs[sweep * span : (sweep + 1) * span] for sample in found[label]}
        assert len(seen) == size


def test_balanced_reaches_every_image_where_batches_cut_the_tail_off() -> None:
    """32 of the 50 images of each class come in an epoch's one step: others each time."""
    plan = BatchPlan(
        100, batch_size=64, rank=0, world_size=1, seed=3, order=_balanced(list(range(2)) * 50, seed=3)
    )  # fmt: skip
    assert plan.steps_per_epoch == 1
    assert len(np.unique([plan.samples(epoch, 0) for epoch in range(12)])) == 100


def test_balanced_goes_through_a_class_in_another_order_each_time() -> None:
    labels = [0] * 20 + [1] * 5
    small = by_class(labels, _epoch(_balanced(labels)))[1]
    assert len(small) in (12, 13)
    assert small[:5] != small[5:10]
    sweeps = [[s for e in (2 * k, 2 * k + 1) for s in by_class(labels, _epoch(_balanced(labels), e))[0][:12]]
              for k in range(3)]  # fmt: skip
    assert len({tuple(sweep) for sweep in sweeps}) == 3


def test_balanced_classes_and_images_are_uniform_over_places() -> None:
    labels = [0] * 9 + [1] * 4 + [2] * 3 + [3] * 2 + [4, 5]
    orders = np.stack([_epoch(_balanced(labels, seed=11), epoch) for epoch in range(1500)])
    classes = np.array(labels)[orders]
    for first, second in [(0, 1), (5, 0), (2, 4), (3, 8)]:  # the last: of two rounds
        pairs = np.zeros((6, 6), int)
        np.add.at(pairs, (classes[:, first], classes[:, second]), 1)
        apart = ~np.eye(6, dtype=bool) if first // 6 == second // 6 else np.ones((6, 6), bool)
        assert not pairs[~apart].any()
        assert chisquare(pairs[apart]).pvalue > 1e-5
    for label, size in Counter(labels).items():
        for place in (0, 7, 14):
            drawn = orders[classes[:, place] == label, place]
            assert size == 1 or chisquare(np.bincount(drawn - labels.index(label), minlength=size)).pvalue > 1e-5


# ---- identities ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 100), epoch=st.integers(0, 9), K=st.integers(1, 9))
def test_groups_are_of_one_identity_and_spread_its_images(labels: list[int], seed: int, epoch: int, K: int) -> None:
    order = _identities(labels, seed, K)
    samples = _epoch(order, epoch)
    sizes = Counter(labels)
    groups = [samples[first : first + K] for first in range(0, len(samples), K)]
    named = Counter()
    for group in groups:
        (label,) = {labels[sample] for sample in group}
        named[label] += 1
        size, times = sizes[label], Counter(group)
        assert len(times) == min(K, size), "different ones, or all there are"
        assert set(times.values()) <= {max(1, K // size), math.ceil(K / size)}
    assert named == {label: math.ceil(size / K) for label, size in sizes.items()}
    assert order.num_positions == K * sum(named.values()) == len(samples)
    for label, found in by_class(labels, samples).items():
        times = Counter(found)
        assert len(times) == sizes[label], "every image comes"
        if sizes[label] >= K:
            assert sum(count - 1 for count in times.values()) == -sizes[label] % K, "twice: what fills the last group"
            assert max(times.values()) <= 2


def test_with_a_group_of_one_every_image_comes_once() -> None:
    labels = ODD["long tail, shuffled"]
    assert sorted(_epoch(_identities(labels, K=1))) == list(range(len(labels)))


def test_groups_are_uniform_over_places_and_images_over_groups() -> None:
    labels = [0] * 8 + [1] * 4 + [2] * 3 + [3]
    orders = np.stack([_epoch(_identities(labels, seed=11), epoch) for epoch in range(1500)])
    classes = np.array(labels)[orders]
    for place in (0, 4, 8, 16):
        assert chisquare(np.bincount(classes[:, place]), 1500 * np.array([2, 1, 1, 1]) / 5).pvalue > 1e-5
        for member in range(4):
            drawn = orders[classes[:, place] == 0, place + member]
            assert chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-5


# ---- both ----------------------------------------------------------------------------------------------------------


def test_these_very_orders_are_kept_from_release_to_release() -> None:
    """A checkpoint resumes in the middle of an order: changing it changes what a resumed epoch sees."""
    assert [_epoch(_balanced(FROZEN_LABELS, seed=1), epoch) for epoch in (0, 2)] == FROZEN_BALANCED
    assert _epoch(_identities(FROZEN_LABELS, seed=1), 2) == FROZEN_IDENTITIES


@BOTH
def test_epochs_and_seeds_differ(make: Make) -> None:
    labels = ODD["long tail, shuffled"]
    orders = [_epoch(make(labels, seed), epoch) for seed, epoch in itertools.product(range(4), range(4))]
    for first, second in itertools.combinations(orders, 2):
        assert np.mean(np.array(first) == np.array(second)) < 0.1


@BOTH
def test_positions_may_be_asked_for_in_any_shape_and_only_within(make: Make) -> None:
    order = make(ODD["one large class"], 5)
    whole = np.array(_epoch(order, 3))
    positions = np.array([[0, 31], [order.num_positions - 1, 7]])
    samples = order.samples(3, positions)
    assert samples.dtype == np.int64
    assert (samples == whole[positions]).all()
    assert order.samples(3, np.arange(0)).shape == (0,)
    for outside in (-1, order.num_positions):
        with pytest.raises(IndexError, match=f"are not within 0 … {order.num_positions - 1}"):
            order.samples(3, np.array([0, outside]))


@BOTH
@pytest.mark.parametrize("labels", ODD.values(), ids=ODD)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(make: Make, labels: list[int]) -> None:
    labels = [label + 100 * copy for copy in range(16) for label in labels]
    batches = {}
    for world_size in (1, 2, 4):
        plans = [
            BatchPlan(len(labels), batch_size=16 // world_size, rank=rank, world_size=world_size, seed=2,
                      order=make(labels, 2))
            for rank in range(world_size)
        ]  # fmt: skip
        (steps,) = {plan.steps_per_epoch for plan in plans}
        assert steps == plans[0].order.num_positions // 16
        batches[world_size] = [
            np.concatenate([plan.samples(1, step * 16) for plan in plans]).tolist() for step in range(steps)
        ]
    assert batches[1] == batches[2] == batches[4]


@pytest.mark.parametrize("sampler", ["balanced", "identities"])
def test_loaders_follow_them_and_resume_in_the_middle_of_an_epoch(sampler: str) -> None:
    """10 classes, three of which have 6 images and the others 5."""
    records = MemorySet([jpeg(seed) for seed in range(53)])

    def ids(start_step: int = 0, **changes: int) -> list[list[int]]:
        settings = {"batch_size": 6, "rank": 0, "world_size": 1} | changes
        loader = build_loader(
            records, seed=3, backend="cpu", device=torch.device("cpu"), threads=2, prefetch=2, flip=True,
            sampler=sampler, images_per_identity=3, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        batches = list(loader.epoch(1, start=start_step * settings["batch_size"]))
        assert len(batches) == loader.steps_per_epoch - start_step
        assert all(batch.labels.equal(batch.sample_ids % 10) for batch in batches)
        return [batch.sample_ids.tolist() for batch in batches]

    whole = ids()
    assert len(whole) == {"balanced": 8, "identities": 10}[sampler]
    for start in (1, 5, len(whole)):
        assert ids(start) == whole[start:]
    halves = [ids(batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    if sampler == "identities":
        groups = [batch[at : at + 3] for batch in whole for at in (0, 3)]
        assert all(len(set(group)) == 3 and len({sample % 10 for sample in group}) == 1 for group in groups)


def test_refusals_say_what_to_do() -> None:
    labels = [0, 0, 0, 1] * 8

    def plan(order: Order, batch_size: int, world_size: int = 1) -> BatchPlan:
        return BatchPlan(32, batch_size=batch_size, rank=0, world_size=world_size, seed=0, order=order)

    for got, use in [(1, 4), (3, 4), (6, 8), (30, 32)]:
        with pytest.raises(DataError) as error:
            plan(_identities(labels), got)
        assert str(error.value) == (
            "train.batch_size: expected a multiple of data.images_per_identity = 4, as an identity's group lies on one "
            f"rank, got {got}: use {use}, or another group"
        )
    with pytest.raises(DataError, match=r"2 rank\(s\) x 20 images = 40 a step, but an epoch has 32 images: lower"):
        plan(_balanced(labels), 20, 2)
    with pytest.raises(DataError, match="expected images_per_identity of 1 or more, got 0"):
        _identities(labels, K=0)
    for make in (_balanced, _identities):
        with pytest.raises(DataError, match="a seed of 0 or more, got -1"):
            make(labels, -1)
    with pytest.raises(DataError, match="got 0 samples"):
        ClassIndex(np.zeros(0, np.int64))
    with pytest.raises(DataError, match="got 3 samples and class -1"):
        ClassIndex(np.array([0, -1, 2]))
