"""The order of windows: every sample once, few places of the files at a time, and what is coming is got in time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import window_order
from data.order.sampler import BatchPlan
from data.order.window_order import WindowOrder

RUN = 8


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_order, "RUN", RUN)


def _epoch(order: WindowOrder, epoch: int = 0) -> list[int]:
    samples: list[int] = order.samples(epoch, np.arange(order.num_positions)).tolist()
    return samples


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 400), window=st.integers(1, 12), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_sample_comes_once(n: int, window: int, seed: int, epoch: int) -> None:
    order = WindowOrder(n, window=window * RUN, seed=seed)
    assert sorted(_epoch(order, epoch)) == list(range(n))
    positions = np.random.default_rng(seed).integers(0, n, (3, 5))
    assert order.samples(epoch, positions).tolist() == [[_epoch(order, epoch)[at] for at in row] for row in positions]


def test_a_window_reads_few_runs_and_mixes_them() -> None:
    order = WindowOrder(6400, window=160, seed=1)
    firsts = []
    for begin in range(0, 6400, 160):
        samples = np.array(_epoch(order)[begin : begin + 160])
        gaps = np.diff(np.sort(samples))
        assert np.count_nonzero(gaps > 1) < 160 / RUN  # places where the files are read
        assert np.count_nonzero(np.diff(samples) == 1) < 10  # no longer side by side
        firsts.append(samples[0])
    assert len(set(np.sign(np.diff(firsts)))) == 2
    others = _epoch(order, 1)
    assert np.mean(np.array(_epoch(order)) == np.array(others)) < 0.01
    assert np.mean(np.array(_epoch(order)) == np.array(_epoch(WindowOrder(6400, window=160, seed=2)))) < 0.01


@pytest.mark.parametrize("begin", [0, 440])
def test_what_is_coming_has_been_announced_before(begin: int) -> None:
    """From the start of an epoch, and after a resume in the middle of a window."""
    order = WindowOrder(1003, window=96, seed=3)
    plan = BatchPlan(1003, batch_size=20, rank=1, world_size=2, seed=3, order=order)
    announced: set[int] = set()
    for start in plan.starts(begin):
        announced.update(plan.coming(5, start, plan.samples(5, start), first=start == begin).tolist())
        assert announced.issuperset(order.samples(5, np.arange(start, start + 40)).tolist())
        assert len(announced) <= start - begin + 40 + 2 * 96
    assert announced.issuperset(order.samples(5, np.arange(begin, 1003)).tolist())


def test_of_the_plain_shuffle_a_rank_announces_its_own() -> None:
    plan = BatchPlan(1003, batch_size=20, rank=1, world_size=2, seed=3)
    mine = plan.samples(2, 80)
    assert plan.coming(2, 80, mine, first=True).tolist() == mine.tolist()


def test_the_last_run_is_another_in_each_epoch() -> None:
    order = WindowOrder(83, window=16, seed=0)
    assert len({tuple(sorted(_epoch(order, epoch)[-3:])) for epoch in range(8)}) == 8


def test_refusals_say_what_to_do() -> None:
    for n, window, seed in ((0, 8, 0), (5, 0, 0), (5, 8, -1)):
        with pytest.raises(DataError, match="expected at least one sample, a seed of 0 or more and a window"):
            WindowOrder(n, window=window, seed=seed)
    with pytest.raises(IndexError, match="are not within 0 … 4"):
        WindowOrder(5, window=8, seed=0).samples(0, np.array([5]))
