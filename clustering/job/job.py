"""A stand-alone k-means from files to files: seeding, iterations, assignments; it goes on where it was interrupted.

Full iterations (`clustering.lloyd.lloyd`) move centres out of poor local optima on the way
(`clustering.lloyd.split_merge`), until no more than a thousandth of the clusters gain by it. While they do, every
iteration starts from centres alone; after that, iterations leave out what bounds make needless, for certain. So a job
that is resumed, or runs on another number of ranks, ends with the same bits.

Legend: N rows of all ranks, P of this rank, D embedding size, K clusters, S of this rank's shard.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.files import FileRows
from clustering.job.state import JobState
from clustering.lloyd.lloyd import Iteration, Lloyd
from clustering.lloyd.minibatch import MiniBatch
from clustering.lloyd.split_merge import split_and_merge
from partial_fc.collectives import all_reduce_
from sharding import shard_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the centres are moved; a job that goes on has the same."""

    num_clusters: int
    iterations: int = 20
    """Times the centres move, at most."""
    tolerance: float = 1e-4
    """Full iterations end once the mean cosine gains less than this share of it."""
    batch: int = 0
    """Rows of a mini-batch, over all ranks; 0: full iterations."""
    seed: int = 0
    """Of the mini-batches."""
    product_dtype: torch.dtype = torch.float32
    """Operands of the comparisons; in bfloat16 they find the candidates, and float64 decides among them as ever."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One iteration, over all ranks; but for the time, the same on each."""

    iteration: int
    mean_cosine: float
    """Of the rows (of the batch) to their centres, before these moved."""
    moved: int | None
    """Rows that changed their cluster; None where that is not known: in a first iteration and for batches."""
    empty: int
    """Clusters without a row; they start anew."""
    rebuilt: int
    """Pairs of clusters of which one was merged away and another split in its place."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Where a job ended."""

    centres_SD: Tensor
    """float32 unit rows; a zero row: a cluster that no row was left for."""
    index_P: Tensor
    """int64: the nearest of these centres, for every row; -1 for a zero row."""
    mean_cosine: float
    """Of all rows but zero ones to it."""
    empty: int
    """Clusters without a row."""
    steps: list[Step]


class Job:
    """Moves centres from where they start, or from a state that was written, to where they stop."""

    def __init__(
        self,
        rows: FileRows,
        settings: Settings,
        state: JobState,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        told: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """rows: surveyed. told: called after every iteration, on every rank."""
        self.rows, self.settings, self.state, self.group, self.device = rows, settings, state, group, device
        self.steps: list[Step] = []
        self._told = told
        self._rebuilds = not settings.batch
        self._index_P: Tensor | None = None

    def run(self, start: Callable[[], Tensor]) -> Outcome:
        """start: gives this rank's shard of the centres to start from, float32 (S, D); unused where a state is.

        Raises InputError on all ranks. Collectives: those of `JobState`, and of `MiniBatch`, or of `Lloyd` and
        `split_and_merge`, one all-reduce more an iteration.
        """
        saved = self.state.read()
        K, D = self.settings.num_clusters, self.rows.dim
        if saved is None:
            centres_SD = start()
        else:
            centres_SD = self.state.array(saved, "centres", K, D)
            self.steps = [Step(**step) for step in saved["steps"]]
            self._rebuilds = saved["rebuilds"]
        if self.settings.batch:
            return self._batches(centres_SD, saved)
        if saved is None:
            self._save({"centres": centres_SD})
        return self._full(centres_SD)

    def _full(self, centres_SD: Tensor) -> Outcome:
        lloyd: Lloyd | None = None
        while len(self.steps) < self.settings.iterations:
            begin = time.perf_counter()
            lloyd = lloyd or self._lloyd(centres_SD, projection=self._rebuilds)
            done = lloyd.iterate()
            before_SD, centres_SD = centres_SD, lloyd.centres_SD
            index_P, rebuilt = lloyd.index_P, 0
            if self._rebuilds:
                lloyd = None
                centres_SD, rebuilt = self._rebuild(index_P, centres_SD)
            settled = not rebuilt and self._settled(done)
            self._tell(done, begin, moved=self._moved(index_P), rebuilt=rebuilt)
            if settled:  # the centres that these are the assignments of
                return self._outcome(before_SD, index_P, done)
            self._save({"centres": centres_SD})
        lloyd = lloyd or self._lloyd(centres_SD, projection=False)
        done = lloyd.assign()
        return self._outcome(centres_SD, lloyd.index_P, done)

    def _lloyd(self, centres_SD: Tensor, *, projection: bool) -> Lloyd:
        return Lloyd(
            self.rows,
            centres_SD=centres_SD,
            num_clusters=self.settings.num_clusters,
            group=self.group,
            first_row=self.rows.shard.start,
            projection=projection,
            product_dtype=self.settings.product_dtype,
        )

    def _rebuild(self, index_P: Tensor, centres_SD: Tensor) -> tuple[Tensor, int]:
        clusters = self.settings.num_clusters
        centres_SD, rebuilt = split_and_merge(
            self.rows, index_P, centres_SD, clusters, self.group, first_row=self.rows.shard.start
        )
        self._rebuilds = rebuilt > clusters // 1000
        return centres_SD, rebuilt

    def _settled(self, done: Iteration) -> bool:
        if not self.steps:
            return False
        gain = done.mean_cosine - self.steps[-1].mean_cosine
        return gain <= self.settings.tolerance * abs(done.mean_cosine)

    def _moved(self, index_P: Tensor) -> int | None:
        """One all-reduce, none the first time."""
        before_P, self._index_P = self._index_P, index_P
        if before_P is None:
            return None
        return int(all_reduce_((before_P != index_P).sum(), self.group))

    def _batches(self, centres_SD: Tensor, saved: dict[str, Any] | None) -> Outcome:
        K, D = self.settings.num_clusters, self.rows.dim
        own = shard_of(dist.get_rank(self.group), dist.get_world_size(self.group), K)
        batches = MiniBatch(
            self.rows,
            centres_SD=centres_SD,
            num_clusters=K,
            group=self.group,
            total=self.rows.total,
            batch=self.settings.batch,
            seed=self.settings.seed,
            product_dtype=self.settings.product_dtype,
        )
        if saved is not None:
            batches.number = saved["number"]
            batches.sums_SD = self.state.array(saved, "sums", K, D, torch.int64)
            counts_S1 = self.state.array(saved, "counts", K, 1, torch.int64)
            batches.counts_K[own.start : own.stop] = counts_S1[:, 0]
            all_reduce_(batches.counts_K, self.group)
        while batches.number < self.settings.iterations:
            begin = time.perf_counter()
            self._tell(batches.iterate(), begin, moved=None, rebuilt=0)
            counts_S1 = batches.counts_K[own.start : own.stop, None]
            self._save({"centres": batches.centres_SD, "sums": batches.sums_SD, "counts": counts_S1})
        final = self._lloyd(batches.centres_SD, projection=True)
        done = final.assign()
        return self._outcome(batches.centres_SD, final.index_P, done)

    def _tell(self, done: Iteration, begin: float, *, moved: int | None, rebuilt: int) -> None:
        step = Step(
            iteration=len(self.steps) + 1,
            mean_cosine=done.mean_cosine,
            moved=moved,
            empty=done.empty,
            rebuilt=rebuilt,
            seconds=round(time.perf_counter() - begin, 3),
        )
        self.steps.append(step)
        self._told(step)

    def _save(self, arrays: dict[str, Tensor]) -> None:
        values = {"steps": [dataclasses.asdict(step) for step in self.steps], "rebuilds": self._rebuilds}
        sharded = {name: (array, self.settings.num_clusters) for name, array in arrays.items()}
        self.state.write(len(self.steps), values, sharded)

    def _outcome(self, centres_SD: Tensor, index_P: Tensor, done: Iteration) -> Outcome:
        return Outcome(
            centres_SD=centres_SD,
            index_P=index_P,
            mean_cosine=done.mean_cosine,
            empty=done.empty,
            steps=self.steps,
        )
