"""Means over the steps between two lines of the log, read from the device once a line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, RunConfig
from partial_fc.collectives import all_reduce_
from training.distributed import Ranks
from training.showing.memory import memory_in_use
from training.showing.metrics import HISTOGRAM_BINS, RunLog, count_histogram
from training.showing.timing import Stopwatch
from training.step import StepValues

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


def cluster_histograms(service: ClusterService, config: RunConfig, step: int, log: RunLog) -> None:
    """Margins and hard levels of all classes: each rank counts its own, one all-reduce adds them."""
    c = config.clustering
    bounds = (0.0, config.head.margin) if c.margin_rule == "kappaface" else (c.margin_low, c.margin_high)
    tags = {"margins": (service.margins_C, *bounds), "hard_level": (service.hard_levels_C, 0.0, 1.0)}
    for tag, (values_C, low, high) in tags.items():
        counts = all_reduce_(count_histogram(values_C, low, high), service.group).cpu()
        total, squares = counts[HISTOGRAM_BINS:].tolist()
        log.histogram(step, f"clusters/{tag}", counts[:HISTOGRAM_BINS], low, high, (total, squares))


class Meter:
    """Adds up step values on the device, and time on this rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums = torch.zeros(len(_NAMES) + 1, device=ranks.device)
        """Of the steps that were not skipped; the last place counts them."""
        self._one = torch.ones((), device=ranks.device)
        self._unusable = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.data_wait = Stopwatch(torch.device("cpu"), "data")
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, values: StepValues) -> None:
        """A step's values. Those of a skipped one would spoil the means: of it only what did not decode counts."""
        parts = (values.total, values.margin, values.contrastive, values.alignment, values.gradient_norm, self._one)
        self._sums += torch.where(values.skipped != 0, 0, torch.stack(parts))
        self._unusable += values.unusable_rows
        self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (evaluation) does not count as training. Waits for the GPU."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @property
    def unusable(self) -> Tensor:
        """Rows without a label since the epoch began: a float64 scalar on the device, equal on all ranks."""
        return self._unusable

    def take(self, stopwatches: Mapping[str, Stopwatch], global_batch: int) -> dict[str, float]:
        """Scalars by their TensorBoard names, means over the steps since the last call; then start again.

        stopwatches: parts of the step by name. Losses and norms are of the steps that were not skipped, nan when all
        were. Each time and each figure of memory is that of the rank with the largest; but for communication, which
        ranks that come early wait in: the smallest says what the wire takes, and the rank that it is of is the one
        that the others wait for. One all-reduce of some numbers a rank; waits for the GPU.
        """
        *means, _ = (self._sums / self._sums[-1]).tolist()
        own = {"step": time.perf_counter() - self._since, "data_wait": self.data_wait.take()}
        own |= {name: watch.take() for name, watch in stopwatches.items()}
        memory = memory_in_use(self._ranks.device)
        largest, waits = self._over_ranks({**own, **memory}, "communication")
        rate = global_batch * self._steps / largest["step"]
        values = dict(zip(_NAMES, means, strict=True))
        values |= {
            "throughput/images_per_second": rate,
            "throughput/images_per_second_per_rank": rate / self._ranks.world_size,
            "data/images_that_did_not_decode": self._unusable.item(),
        }
        values |= {name: largest[name] for name in memory}
        values |= {f"time/{name}_ms": 1000 * largest[name] / self._steps for name in own if name != "communication"}
        if self._ranks.world_size > 1:
            values |= {
                "time/communication_ms": 1000 * min(waits) / self._steps,
                "ranks/wait_ms": 1000 * (max(waits) - min(waits)) / self._steps,
                "ranks/slowest": float(waits.index(min(waits))),
            }
        self._sums.zero_()
        self._steps = 0
        self._since = time.perf_counter()
        return values

    def _over_ranks(self, own: Mapping[str, float], each: str) -> tuple[dict[str, float], list[float]]:
        """The largest of all ranks' values by name, and those called `each` in rank order. One all-reduce."""
        table_WV = torch.zeros(self._ranks.world_size, len(own), dtype=torch.float64, device=self._ranks.device)
        table_WV[self._ranks.rank] = torch.tensor(list(own.values()), dtype=torch.float64)
        columns = zip(*all_reduce_(table_WV, self._ranks.group).tolist(), strict=True)
        by_name = dict(zip(own, columns, strict=True))
        return {name: max(column) for name, column in by_name.items()}, list(by_name[each])
