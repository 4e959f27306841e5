"""When refreshes start and end, how their slices are spread, and the ramp."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustering.schedule import RefreshSchedule
from configs.schema import ClusteringConfig


def _schedule(total: int, epoch: int, **settings: float) -> RefreshSchedule:
    return RefreshSchedule.of(ClusteringConfig(**settings), total_steps=total, steps_per_epoch=epoch)  # type: ignore[arg-type]


def test_first_refresh_after_one_epoch_then_each_interval() -> None:
    schedule = _schedule(50, 10, refresh_epochs=1.5, refresh_span=0.4)
    assert [done for done in range(51) if schedule.starts_after(done)] == [10, 25, 40]
    assert schedule.span == 6


def test_a_refresh_that_would_end_with_the_training_is_not_begun() -> None:
    schedule = _schedule(40, 10, refresh_span=1.0)
    assert [done for done in range(41) if schedule.starts_after(done)] == [10, 20]


@given(span=st.integers(1, 50), length=st.integers(1, 3000))
def test_slices_are_even_and_complete(span: int, length: int) -> None:
    schedule = RefreshSchedule(total_steps=1000, first=1, interval=span, span=span, warmup=0, ramp_steps=0)
    until = [schedule.slices_until(steps, length) for steps in range(span + 2)]
    assert until[0] == 0
    assert until[span] == until[span + 1] == length
    a_step = [later - earlier for earlier, later in itertools.pairwise(until[: span + 1])]
    assert max(a_step) - min(a_step) <= 1


def test_ramp_is_zero_then_linear_then_one() -> None:
    schedule = _schedule(100, 5, warmup_fraction=0.2, ramp_fraction=0.1)
    ramps = [schedule.ramp(step) for step in range(100)]
    assert ramps[:21] == [0.0] * 21
    assert ramps[25] == pytest.approx(0.5)
    assert ramps[30:] == [1.0] * 70
    assert ramps == sorted(ramps)


def test_ramp_waits_for_the_first_publication() -> None:
    schedule = _schedule(100, 30, warmup_fraction=0.1, ramp_fraction=0.2, refresh_span=0.5)
    assert schedule.ramp(45) == 0, "published after 30 + 15 steps"
    assert schedule.ramp(55) == pytest.approx(0.5)
    assert _schedule(100, 30, warmup_fraction=0.1, ramp_fraction=0.0).ramp(45) == 1
    assert _schedule(40, 30, warmup_fraction=0.0, ramp_fraction=0.0).ramp(39) == 0, "no refresh fits: plain to the end"
