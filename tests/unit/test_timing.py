"""The stopwatch by a clock that moves when it is told to, and memory against what the kernel says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import training.showing.timing
from training.showing.memory import memory_in_use
from training.showing.timing import Stopwatch

CPU = torch.device("cpu")


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(training.showing.timing, "time", made)
    return made


def test_it_adds_up_what_lies_between(clock: _Clock) -> None:
    watch = Stopwatch(CPU)
    for seconds in (1.0, 2.5):
        with watch:
            clock.now += seconds
        clock.now += 10
    watch.start()
    clock.now += 0.25
    watch.stop()
    assert watch.take() == 3.75
    assert watch.take() == 0


def test_an_end_without_a_beginning_counts_nothing(clock: _Clock) -> None:
    """A hook that was not called: the backward pass did not come to it."""
    watch = Stopwatch(CPU)
    with watch:
        clock.now += 1
    clock.now += 5
    watch.stop()
    assert watch.take() == 1


def test_an_error_in_it_is_counted_and_passed_on(clock: _Clock) -> None:
    watch = Stopwatch(CPU)

    def fail() -> None:
        with watch:
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert watch.take() == 2


def test_traces_show_it_by_name() -> None:
    named, unnamed = Stopwatch(CPU, "backbone"), Stopwatch(CPU)
    with profile(activities=[ProfilerActivity.CPU]) as trace, named, unnamed:
        torch.ones(3).sum()
    with named:
        torch.ones(3).prod()
    names = [event.name for event in trace.events()]
    assert names.count("backbone") == 1
    assert "aten::sum" in names


def test_resident_memory_is_what_the_kernel_says() -> None:
    before = memory_in_use(CPU)
    assert list(before) == ["memory/resident_gb"]
    held = np.ones(16_000_000)
    after = memory_in_use(CPU)["memory/resident_gb"]
    (said,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert after == pytest.approx(int(said) * 1024 / 1e9, rel=0.02)
    assert after - before["memory/resident_gb"] == pytest.approx(held.nbytes / 1e9, rel=0.2)
