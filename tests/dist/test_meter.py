"""What the log says of a step's time over several ranks, by clocks that say what a test wants them to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import training.showing.meter
import training.showing.timing
from tests.dist.test_guard import Run
from tests.ranks import WORLD_SIZES, RankPool, ranks_of
from training.showing.meter import Meter
from training.showing.timing import Stopwatch

STEPS = 4


class _Ticks:
    """A clock that is a second later each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


class _Clock:
    """One that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def _ticking(group: dist.ProcessGroup, micro_batches: int) -> dict[str, float]:
    run = Run(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.showing.timing, "time", _Ticks())
        run.step(0, micro_batches=micro_batches)
        run.step(1, micro_batches=micro_batches)
        return {name: watch.take() / 2 for name, watch in run.train_step.stopwatches.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_part_is_measured_where_it_is(ranks: RankPool, world_size: int, micro_batches: int) -> None:
    """Backbone: forward, backward. Head, for each micro-batch: from before the gather to behind the reduce-scatter,
    and in between the four looks at the clock for these two; and the optimizer's step.
    """
    expected = {"backbone": 2 * micro_batches, "head": 5 * micro_batches + 1, "communication": 2 * micro_batches}
    for found in ranks.run(world_size, _ticking, micro_batches):
        assert found == {**expected, "cluster": 0}


def _straggling(group: dist.ProcessGroup, slow: int) -> dict[str, float]:
    """Rank `slow` takes ten times as long to decode; the others wait for it in the gather, longer by their number."""
    ranks = ranks_of(group)
    clock = _Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.showing.timing, "time", clock)
        patch.setattr(training.showing.meter, "time", clock)
        meter = Meter(ranks)
        run = Run(group)
        watches = {name: Stopwatch(torch.device("cpu")) for name in ("backbone", "head", "communication")}
        for step in range(STEPS):
            values = run.step(step)
            with meter.data_wait:
                clock.now += 0.010 if ranks.rank == slow else 0.001
            with watches["backbone"]:
                clock.now += 0.1 + 0.001 * ranks.rank
            with watches["head"], watches["communication"]:
                clock.now += 0.002 if ranks.rank == slow else 0.011 + 0.001 * ranks.rank
            meter.add(values)
        with meter.pause():
            clock.now += 1000
        return meter.take(watches, 32)


@pytest.mark.parametrize(("world_size", "slow"), [(2, 0), (2, 1), (4, 2)])
def test_a_straggler_shows(ranks: RankPool, world_size: int, slow: int) -> None:
    parts = ranks.run(world_size, _straggling, slow)
    last = world_size - 1
    for values in parts:
        for name in ("memory/resident_gb", "throughput/images_per_second"):
            assert values[name] == parts[0][name] > 0, "all ranks say the same"
        assert values["time/data_wait_ms"] == pytest.approx(10)
        assert values["time/backbone_ms"] == pytest.approx(100 + last)
        most = max(rank for rank in range(world_size) if rank != slow)
        assert values["time/head_ms"] == pytest.approx(11 + most)
        assert values["time/communication_ms"] == pytest.approx(2)
        assert values["ranks/wait_ms"] == pytest.approx(9 + most)
        assert values["ranks/slowest"] == slow
        steps = [10 + 100 + rank + 2 if rank == slow else 1 + 100 + rank + 11 + rank for rank in range(world_size)]
        assert values["time/step_ms"] == pytest.approx(max(steps))
        assert values["throughput/images_per_second_per_rank"] == pytest.approx(32 / max(steps) * 1000 / world_size)


def test_one_rank_waits_for_nobody(ranks: RankPool) -> None:
    (values,) = ranks.run(1, _straggling, 0)
    assert values["time/step_ms"] == pytest.approx(112)
    parts = [values[f"time/{part}_ms"] for part in ("data_wait", "backbone", "head")]
    assert sum(parts) == pytest.approx(112)
    assert not {"time/communication_ms", "ranks/wait_ms", "ranks/slowest"} & values.keys()
