"""How fast a refresh goes: over how many steps it is spread, so that it stays within its share of a training step.

Without a limit (`clustering.step_budget` 0) nothing is measured, and a run is the same whatever the machine. With one,
the time of the last refresh's slices and of training's steps decides; slices are of about one cost, so it is told in
seconds a slice.
"""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from partial_fc.collectives import all_reduce_

_STEPS_KEPT = 1000  # step times that the median is of


class Stopwatch(AbstractContextManager[Any], Protocol):
    """Adds up the time spent inside of it, without making the work wait."""

    def take(self) -> float:
        """Seconds since the last call. May wait for the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Of one refresh; a part of its state."""

    steps: int
    """Training steps over which it is spread."""
    iterations: int
    """Of k-means."""

    def slices_due(self, steps: int, length: int) -> int:
        """Slices, of `length` in all, that are to be done `steps` steps after the start: even, all at the last."""
        return -(-length * min(steps, self.steps) // self.steps)


def plan_refresh(
    wanted: Plan, *, longest: int, fixed: int, per_iteration: int, slice_seconds: float, allowed: float
) -> Plan:
    """The plan nearest to `wanted` whose slices take at most `allowed` seconds a step on average.

    First it is spread over more steps, `longest` at most; then it makes fewer iterations, at least one, even where that
    takes longer than allowed. fixed, per_iteration: slices outside of iterations, and of each.
    """
    affordable = math.floor(longest * allowed / slice_seconds)
    iterations = min(wanted.iterations, max(1, (affordable - fixed) // per_iteration))
    steps = math.ceil((fixed + iterations * per_iteration) * slice_seconds / allowed)
    return Plan(steps=min(longest, max(wanted.steps, steps)), iterations=iterations)


class Pace:
    """Measures slices and steps on this rank, and plans a refresh with all ranks."""

    def __init__(self, budget: float, stopwatch: Stopwatch | None) -> None:
        """budget: largest share of a step, 0 for no limit. stopwatch: needed with a limit; ValueError without."""
        if budget and stopwatch is None:
            raise ValueError("stopwatch: expected one, as clustering.step_budget sets a limit, got None")
        self._budget, self._stopwatch = budget, stopwatch
        self._slices = 0
        self._slice_seconds = self._step_seconds = 0.0
        self._times: collections.deque[float] = collections.deque(maxlen=_STEPS_KEPT)
        self._last: float | None = None

    @property
    def limited(self) -> bool:
        return self._budget > 0

    def step(self) -> None:
        """Once a training step."""
        if self.limited:
            now = time.perf_counter()
            if self._last is not None:
                self._times.append(now - self._last)
            self._last = now

    def slices(self, number: int) -> AbstractContextManager[Any]:
        """Context of work on so many slices."""
        if self._stopwatch is None or not self.limited:
            return contextlib.nullcontext()
        self._slices += number
        return self._stopwatch

    def plan(
        self, wanted: Plan, slices: tuple[int, int], longest: int, group: dist.ProcessGroup, device: torch.device
    ) -> Plan:
        """`plan_refresh` from what the slowest rank measured; `wanted` without a limit or a measurement.

        slices: outside of iterations, and of each. One all-reduce with a limit, none without.
        """
        if self._stopwatch is None or not self.limited:
            return wanted
        seconds = self._stopwatch.take()
        if self._slices:
            self._slice_seconds = seconds / self._slices
        if self._times:  # the median, as evaluations and checkpoints lie between some steps
            self._step_seconds = statistics.median(self._times)
        self._slices = 0
        self._times.clear()
        told = torch.tensor([self._slice_seconds, -self._step_seconds], dtype=torch.float64, device=device)
        slice_seconds, negated = all_reduce_(told, group, dist.ReduceOp.MAX).tolist()
        if slice_seconds <= 0 or negated >= 0:
            return wanted
        return plan_refresh(
            wanted,
            longest=longest,
            fixed=slices[0],
            per_iteration=slices[1],
            slice_seconds=slice_seconds,
            allowed=-negated * self._budget,
        )

    def state_dict(self) -> dict[str, float]:
        return {"slice_seconds": self._slice_seconds, "step_seconds": self._step_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._slice_seconds, self._step_seconds = state["slice_seconds"], state["step_seconds"]
        self._last = None
