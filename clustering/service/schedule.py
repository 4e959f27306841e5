"""When a refresh starts, how many slices a step does, and how strongly the cluster terms count: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.schema import ClusteringConfig

_COMPARISONS = 3 << 30
"""Of a slice on a GPU: 5 ms of an H100 at D = 512. Every slice makes the host wait once, so that few are better."""
_MOST = 1 << 17


def points_at_once(clusters: int, device: torch.device) -> int:
    """Points of a slice where the settings leave it open. clusters: of a rank, with which a slice compares them."""
    return min(_MOST, max(1, _COMPARISONS // max(1, clusters))) if device.type == "cuda" else 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshSchedule:
    """`done` counts finished optimizer steps: 1 after the first."""

    total_steps: int
    first: int
    """Steps before the first refresh: one epoch, in which every sample may have been seen."""
    interval: int
    """Steps between the starts of two refreshes."""
    span: int
    """Steps over which one refresh is spread, unless a limit on its time asks for more; at most `interval`."""
    warmup: float
    ramp_steps: float

    @classmethod
    def of(cls, config: ClusteringConfig, *, total_steps: int, steps_per_epoch: int) -> RefreshSchedule:
        interval = max(1, round(config.refresh_epochs * steps_per_epoch))
        return cls(
            total_steps=total_steps,
            first=steps_per_epoch,
            interval=interval,
            span=max(1, round(config.refresh_span * interval)),
            warmup=config.warmup_fraction * total_steps,
            ramp_steps=config.ramp_fraction * total_steps,
        )

    def starts_after(self, done: int) -> bool:
        """A refresh begins when `done` steps are finished, unless it could no longer be of use."""
        due = done >= self.first and (done - self.first) % self.interval == 0
        return due and done + self.span < self.total_steps

    def longest(self, done: int) -> int:
        """Steps over which a refresh that begins when `done` steps are finished can be spread, at the most."""
        return min(self.interval, self.total_steps - done - 1)

    def ramp(self, step: int, published: int | None = None) -> float:
        """0 … 1: weight of the cluster terms in step `step` (from 0).

        Linear growth over `ramp_steps` from the end of the warm-up, or from the first publication when that comes
        later; all at once when ramp_steps is 0. published: steps that were finished then, those that the schedule
        means unless given.
        """
        begin = max(self.warmup, self.first + self.span if published is None else published)
        if step < begin:
            return 0.0
        return min(1.0, (step - begin) / self.ramp_steps) if self.ramp_steps else 1.0
