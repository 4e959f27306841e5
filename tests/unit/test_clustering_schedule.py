"""When refreshes start and end, how their slices are spread, with a limit or without, and the ramp."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clustering.service.pace import Plan, plan_refresh
from clustering.service.schedule import RefreshSchedule, points_at_once
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
    plan = Plan(steps=span, iterations=3)
    until = [plan.slices_due(steps, length) for steps in range(span + 2)]
    assert until[0] == 0
    assert until[span] == until[span + 1] == length
    a_step = [later - earlier for earlier, later in itertools.pairwise(until[: span + 1])]
    assert max(a_step) - min(a_step) <= 1


def _planned(**changed: float) -> Plan:
    """Wanted: 3 iterations of 20 slices and 10 others, so 70 slices, in 50 steps of at most 100."""
    settings = {"longest": 100, "fixed": 10, "per_iteration": 20, "slice_seconds": 1.0, "allowed": 2.0, **changed}
    return plan_refresh(Plan(steps=50, iterations=3), **settings)  # type: ignore[arg-type]


def test_a_refresh_within_its_limit_is_left_as_wanted() -> None:
    assert _planned() == Plan(steps=50, iterations=3)
    assert _planned(allowed=70 / 50) == Plan(steps=50, iterations=3)


def test_a_limit_first_spreads_a_refresh_then_cuts_its_iterations() -> None:
    assert _planned(allowed=1.0) == Plan(steps=70, iterations=3)
    assert _planned(allowed=0.7) == Plan(steps=100, iterations=3)
    assert _planned(allowed=0.69) == Plan(steps=73, iterations=2)
    assert _planned(allowed=0.3) == Plan(steps=100, iterations=1)
    assert _planned(allowed=0.001) == Plan(steps=100, iterations=1), "the least there is"


@given(
    longest=st.integers(50, 500),
    fixed=st.integers(1, 60),
    per_iteration=st.integers(1, 400),
    slice_seconds=st.floats(1e-6, 10),
    allowed=st.floats(1e-6, 10),
)
def test_a_plan_keeps_its_limit_where_one_iteration_can(**settings: float) -> None:
    plan = _planned(**settings)
    slices = settings["fixed"] + plan.iterations * settings["per_iteration"]
    assert 1 <= plan.iterations <= 3
    assert 50 <= plan.steps <= settings["longest"]
    within = slices * settings["slice_seconds"] <= settings["allowed"] * plan.steps * (1 + 1e-9)
    assert within or (plan.iterations == 1 and plan.steps == settings["longest"])


def test_a_refresh_is_never_spread_beyond_the_next_or_the_end() -> None:
    schedule = _schedule(40, 10)
    assert [schedule.longest(done) for done in (10, 20, 30)] == [10, 10, 9]


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
    assert schedule.ramp(75, published=70) == pytest.approx(0.25), "published later, as the first refresh failed"
    assert schedule.ramp(25, published=10) == pytest.approx(0.75), "published earlier"
    assert _schedule(100, 30, warmup_fraction=0.1, ramp_fraction=0.0).ramp(45) == 1
    assert _schedule(40, 30, warmup_fraction=0.0, ramp_fraction=0.0).ramp(39) == 0, "no refresh fits: plain to the end"


def test_points_of_a_slice() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [points_at_once(clusters, cpu) for clusters in (1, 2_300_000)] == [4096, 4096]
    assert [points_at_once(clusters, gpu) for clusters in (1, 1000, 107_446, 414_267, 2_300_000)] == [
        *(131072, 131072, 29979, 7775, 1400),
    ]
    assert points_at_once(1 << 40, gpu) == 1
