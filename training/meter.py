"""Means over the steps between two lines of the log, read from the device once a line."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import ClusteringConfig
from partial_fc.collectives import all_reduce_
from training.distributed import Ranks
from training.step import StepValues
from training.timing import Stopwatch

_NAMES = ("loss/total", "loss/margin", "loss/contrastive", "loss/alignment", "optim/gradient_norm")


_MUCH = 0.1  # share of a step's time


def cluster_advice(values: Mapping[str, float], config: ClusteringConfig) -> str:
    """What to say of the scalars of a line when clusters took much of the time that nothing limits; else nothing."""
    share = values["time/cluster_ms"] / values["time/step_ms"]
    if share <= _MUCH or config.step_budget:
        return ""
    return (
        f"clusters took {share:.0%} of the steps' time since the last line; --set clustering.step_budget=0.05 would "
        "spread their refreshes"
    )


class Meter:
    """Adds up step values on the device, and time on this rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums = torch.zeros(len(_NAMES), device=ranks.device)
        self._latest = torch.zeros((), device=ranks.device)
        self._unusable = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.data_wait = Stopwatch(torch.device("cpu"))
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, values: StepValues) -> None:
        self._latest = values.total + values.gradient_norm
        self._sums += torch.stack(
            [values.total, values.margin, values.contrastive, values.alignment, values.gradient_norm]
        )
        self._unusable += values.unusable_rows
        self._steps += 1

    @property
    def diverged(self) -> bool:
        """Whether the last step's loss or gradient was not finite; the same on all ranks. Waits for the GPU."""
        return not math.isfinite(self._latest.item())

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (evaluation, checkpoints) does not count as training. Waits for the GPU."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @property
    def unusable(self) -> Tensor:
        """Rows without a label since the epoch began: a float64 scalar on the device, equal on all ranks."""
        return self._unusable

    def take(self, head_time: Stopwatch, cluster_time: Stopwatch, global_batch: int) -> dict[str, float]:
        """Scalars by their TensorBoard names, means over the steps since the last call; then start again.

        Times are those of the slowest rank. One all-reduce; waits for the GPU.
        """
        means = (self._sums / self._steps).tolist()
        seconds = torch.tensor(
            [time.perf_counter() - self._since, self.data_wait.take(), head_time.take(), cluster_time.take()],
            dtype=torch.float64,
            device=self._ranks.device,
        )
        elapsed, wait, head, cluster = all_reduce_(seconds, self._ranks.group, dist.ReduceOp.MAX).tolist()
        rate = global_batch * self._steps / elapsed
        values = dict(zip(_NAMES, means, strict=True))
        values |= {
            "throughput/images_per_second": rate,
            "throughput/images_per_second_per_rank": rate / self._ranks.world_size,
            "time/step_ms": 1000 * elapsed / self._steps,
            "time/data_wait_ms": 1000 * wait / self._steps,
            "time/head_ms": 1000 * head / self._steps,
            "time/cluster_ms": 1000 * cluster / self._steps,
            "data/images_that_did_not_decode": self._unusable.item(),
        }
        self._sums.zero_()
        self._steps = 0
        self._since = time.perf_counter()
        return values
