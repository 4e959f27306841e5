"""Spherical k-means over all ranks, cut into slices that fit between training steps, and resumable at any slice.

Points lie with the owner of their class, centres are sharded by cluster. What is computed is that of
`clustering.kmeans`, read there first. An iteration is cut like this:

- assign: for each rank r its centres are broadcast once, and every rank compares its own points with them, `block`
  points a slice, keeping the best so far; near ones are decided in float64 (`clustering.nearest.nearest`). Ranks
  without points left do nothing, yet every rank counts the same slices;
- seed: gate, counts and seeds (`clustering.service.seeds`), one slice;
- mean: for each rank r partial sums, a range of points a slice, are reduced to r with the last.

Sums are exact (`clustering.service.shards`), so neither assignments nor centres depend on the number of ranks. Points
that are not seen when a run begins take no part in it. Buffers that collectives need are made at the beginning; with a
guard, a rank on which something failed goes on as one without points.

Legend: P points of this rank, b points of a block, S centres of a shard, s of them that exist, D embedding size,
K clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import Gate
from clustering.service import seeds
from clustering.service.bank import Points
from clustering.service.comparing import Comparing
from clustering.service.guard import Guard, T
from clustering.service.schedule import points_at_once
from clustering.service.shards import add_rows_, show_rows, sum_rows_, unit_or
from partial_fc.collectives import all_reduce_
from sharding import all_shards

_ADDED_AT_A_TIME = 128
"""Centres that a point is compared with in the time in which it is added to a sum: makes slices of about one cost."""
_MOST_ADDED = 1 << 20
"""Points that are added to sums at a time: some 4 GB of a GPU's memory to read and write."""
OF_POINTS = ("best_P", "index_P", "counted_P", "taking_part_P")


def _plainly(what: str, work: Callable[[], T], otherwise: T) -> T:
    """Without a guard: what goes wrong is raised."""
    return work()


class KMeansRun:
    """One refresh: `advance()` does one slice and says whether more are left."""

    def __init__(
        self,
        *,
        points: Points,
        centres_SD: Tensor | None,
        num_clusters: int,
        iterations: int,
        block: int,
        gate: Gate | None,
        group: dist.ProcessGroup,
        start_P: Tensor | None = None,
        guard: Guard | None = None,
    ) -> None:
        """points: not copied, must stay as they are until the end.

        centres_SD: this rank's shard of the centres to start from (copied), or None for means: of the classes, or of
        the clusters in start_P, int64 (P,), -1 for a point that starts in none. Centres are float32, or float64 for
        points of float64. block: points of a slice; 0: by device and clusters. gate: may run collectives; called once
        an iteration, on a rank that failed with no point assigned; must not raise before its last collective. guard:
        keeps what fails on this rank; without one it is raised.
        """
        self.points, self.gate, self.group = points, gate, group
        self._guard, self._attempt = guard, _plainly if guard is None else guard.run
        self.rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self.shards = all_shards(world_size, num_clusters)
        P, D = points.x_PD.shape
        device = points.x_PD.device
        own, largest = self.shards[self.rank], self.shards[0].size
        self.num_clusters, self.block = num_clusters, block or points_at_once(largest, device)
        self.dtype = torch.float64 if points.x_PD.dtype == torch.float64 else torch.float32
        self.from_means = centres_SD is None
        start_SD = torch.zeros(own.size, D, device=device) if centres_SD is None else centres_SD
        self.centres_SD = start_SD.to(self.dtype, copy=True)
        self.taking_part_P = points.seen_P.clone()
        self.counted_P = self.taking_part_P.clone()
        self.best_P = torch.full((P,), float("-inf"), dtype=torch.float64, device=device)  # exact, like its parts
        self.index_P = torch.where(self.taking_part_P, points.class_P if start_P is None else start_P, -1)
        self.counted_P &= self.index_P >= 0
        self.seed_point_Q = torch.empty(0, dtype=torch.int64, device=device)
        self.seed_cluster_Q = torch.empty(0, dtype=torch.int64, device=device)
        self._shown_XD = torch.empty(largest if world_size > 1 else 0, D, dtype=self.dtype, device=device)
        self._sums_XD = torch.zeros(largest, D, dtype=torch.int64, device=device)
        self._count_K = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        self._order = seeds.Order(group, device)
        # None is saved in a checkpoint: a resumed run shows the same rows and adds up the same points again.
        self._comparing = Comparing(points.x_PD, self.block, self.dtype)
        self._summed = (0, 0)
        self._withdrawn = False
        self.added = max(
            self.block, min(_MOST_ADDED, self.block * max(1, num_clusters // (_ADDED_AT_A_TIME * world_size)))
        )
        """Points that are added to sums in about the time of a slice."""
        self._slices = self._plan(iterations, world_size)
        self.done = 0

    def _plan(self, iterations: int, world_size: int) -> list[tuple[str, int, int]]:
        """(kind, rank, part) of every slice; the same list on all ranks."""
        blocks = -(-self.points.largest // self.block)
        # A rank's clusters have about 1 / world_size of the points.
        parts = max(1, -(-self.points.largest // (self.added * world_size)))
        means = [("mean", rank, part) for rank in range(world_size) for part in range(parts)]
        passes = [("assign", rank, block) for rank in range(world_size) for block in range(blocks)]
        one = [*passes, ("seed", 0, 0), *means]
        self._mean_parts, self.slices_of_an_iteration = parts, len(one)
        return (means if self.from_means else []) + one * iterations

    def limit(self, iterations: int) -> None:
        """Make only so many iterations, at most as many as said at first; before the first is over."""
        before = len(self._slices) % self.slices_of_an_iteration if self.from_means else 0
        del self._slices[before + iterations * self.slices_of_an_iteration :]

    @property
    def kind_of_next(self) -> str:
        """assign, seed or mean."""
        return self._slices[self.done][0]

    @property
    def length(self) -> int:
        """Slices in all; the same on every rank."""
        return len(self._slices)

    @torch.no_grad()
    def advance(self) -> bool:
        """Do the next slice; False when none is left afterwards.

        Collectives: assign, one broadcast when its rank's centres are first needed; seed, those of the gate and one
        all-reduce, with empty clusters also those of `clustering.service.seeds.Order.exchange_`; mean, one reduce with
        its last part.
        """
        self._withdraw_if_failed()
        kind, rank, part = self._slices[self.done]
        if kind == "assign":
            if self._comparing.shown != rank:
                self._comparing.put_away()  # its memory is free for the next rank's
                self._comparing.show(rank, self.shards[rank].start, self.show(rank))
            self._attempt("assign", lambda: self._assign(rank, part), None)
        elif kind == "seed":
            self._seed()
        else:
            self._mean(rank, part, self.counted_P, seeded=True)
        self.done += 1
        return self.done < len(self._slices)

    def show(self, rank: int) -> Tensor:
        """The centres of `rank`, (S, D), until something else is shown. One broadcast."""
        return show_rows(self.centres_SD, self.shards[rank], rank, self.group, self._shown_XD)

    @property
    def mean_parts(self) -> int:
        """Parts in which the points of a rank's clusters are added up; the same on every rank."""
        return self._mean_parts

    def mean_of(self, rank: int, part: int, taken_P: Tensor) -> None:
        """A slice that makes centres of `rank` the means of the points taken (bool (P,)) in their clusters; one without
        keeps what it has. Doing it again changes nothing. One reduce with the last part.
        """
        self._mean(rank, part, taken_P, seeded=False)

    def work_space(self, rows: int) -> Tensor:
        """int64 zeros (rows, D) for the gate, as many rows as the largest shard of clusters at most; until means."""
        return self._sums_XD[:rows].zero_()

    def _withdraw_if_failed(self) -> None:
        """Go on as a rank without points, in place."""
        if self._guard is None or not self._guard.failure or self._withdrawn:
            return
        self.taking_part_P.fill_(False)
        self.counted_P.fill_(False)
        self.index_P.fill_(-1)
        self.seed_point_Q, self.seed_cluster_Q = self.seed_point_Q[:0], self.seed_cluster_Q[:0]
        self._comparing.recount()
        self._withdrawn = True

    def _assign(self, rank: int, block: int) -> None:
        """Compare a block of points with the centres that are shown. No collective."""
        if rank == block == 0:
            self.best_P.fill_(float("-inf"))
            self.index_P.fill_(-1)
            self._comparing.begin()
        if rank == 0:
            self._comparing.look(block)
        self._comparing.compare_(block, self.taking_part_P, self.best_P, self.index_P)

    def _seed(self) -> None:
        self._comparing.put_away()
        self._attempt("assign", self._comparing.check, None)
        self._withdraw_if_failed()
        if self.gate is None:
            self.counted_P = self._attempt("seed", lambda: self.index_P >= 0, self.counted_P)
        else:
            self.counted_P = self.gate(self.index_P)
        counts_K = self._count_K.zero_()
        self._attempt("seed", lambda: self._count_(counts_K), None)
        wanted = seeds.empty_clusters(all_reduce_(counts_K, self.group))
        self.seed_point_Q = self.seed_cluster_Q = nobody_Q = self.index_P[:0]
        if wanted:
            self._order.clear_()
            point_Q, level_Q = self._attempt("seed", self._candidates, (nobody_Q, nobody_Q))
            self._order.exchange_()
            seeded = self._attempt("seed", lambda: self._planted(point_Q, level_Q, wanted), (nobody_Q, nobody_Q))
            self.seed_point_Q, self.seed_cluster_Q = seeded

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """This rank's, counted: points and levels."""
        point_Q, level_Q = seeds.worst_of_each_class(self.best_P, self.counted_P, self.points.class_P)
        self._order.count_(level_Q)
        return point_Q, level_Q

    def _planted(self, point_Q: Tensor, level_Q: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Those of this rank's candidates that seed one of the `wanted` empty clusters, and which."""
        place_Q = self._order.places(level_Q)
        chosen_Q = place_Q < wanted
        return point_Q[chosen_Q], seeds.nth_empty(self._count_K, place_Q[chosen_Q])

    def _count_(self, counts_K: Tensor) -> None:
        counts_K.copy_(torch.bincount(self.index_P[self.counted_P], minlength=self.num_clusters))

    def _mean(self, rank: int, part: int, taken_P: Tensor, *, seeded: bool) -> None:
        first = part if self._summed == (rank, part) else 0  # after resuming, or at the beginning
        sums_SD = self._sums_XD[: self.shards[rank].size]
        if first == 0:
            sums_SD.zero_()
        for number in range(first, part + 1):
            self._attempt("mean", lambda number=number: self._add_(sums_SD, rank, number, taken_P), None)  # type: ignore[misc]
            if seeded and number == 0:
                self._attempt("mean", lambda: self._add_seeds_(sums_SD, rank), None)
        self._summed = (rank, part + 1)
        if part + 1 < self._mean_parts:
            return
        sum_rows_(sums_SD, rank, self.group)
        if rank == self.rank:
            self.centres_SD = self._attempt("mean", lambda: self._centres(sums_SD), self.centres_SD)

    def _add_(self, sums_SD: Tensor, rank: int, part: int, taken_P: Tensor) -> None:
        """Add the points taken of the clusters of `rank`."""
        shard = self.shards[rank]
        step = self.added * len(self.shards)
        range_p = slice(part * step, (part + 1) * step)
        index_p = self.index_P[range_p]
        inside_p = taken_P[range_p] & (index_p >= shard.start) & (index_p < shard.stop)
        point_Q = inside_p.nonzero()[:, 0] + range_p.start
        add_rows_(sums_SD, self.index_P[point_Q] - shard.start, self.points.x_PD, point_Q)

    def _add_seeds_(self, sums_SD: Tensor, rank: int) -> None:
        shard = self.shards[rank]
        seed_Q = (self.seed_cluster_Q >= shard.start) & (self.seed_cluster_Q < shard.stop)
        add_rows_(sums_SD, self.seed_cluster_Q[seed_Q] - shard.start, self.points.x_PD, self.seed_point_Q[seed_Q])

    def _centres(self, sums_SD: Tensor) -> Tensor:
        centres_SD = unit_or(sums_SD.double(), self.centres_SD.double()).to(self.dtype)
        if not bool(torch.isfinite(centres_SD).all()):
            raise FloatingPointError("centres are not finite")
        return centres_SD

    def _cut(self) -> list[int]:
        """What decides how many slices there are of each kind."""
        return [len(self.shards), self.points.largest, self.block, self.added]

    def _phases(self) -> list[int]:
        """Of each slice, and of the end: how many times one of another kind has followed."""
        kinds = [kind for kind, _, _ in self._slices]
        changes = (before != after for before, after in itertools.pairwise([*kinds, ""]))
        return list(itertools.accumulate(changes, initial=0))

    def state_dict(self) -> dict[str, Any]:
        """Of points and centres; tensors are this run's own, not copies, but for seed_P: the empty cluster that a point
        is to begin, -1 for none."""
        seed_P = torch.full_like(self.index_P, -1)
        seed_P[self.seed_point_Q] = self.seed_cluster_Q
        state: dict[str, Any] = {name: getattr(self, name) for name in OF_POINTS}
        place = {"done": self.done, "phase": self._phases()[self.done], "cut": self._cut()}
        return {**state, "centres_SD": self.centres_SD, "seed_P": seed_P, **place}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue a run of the same construction, at the slice where it was saved: whether that was possible.

        One that was cut otherwise, over other ranks, goes on where that comparing, or those means, began: both are a
        function of what was there before, and doing a part of them twice changes nothing.
        """
        device = self.centres_SD.device
        for name in (*OF_POINTS, "centres_SD"):
            setattr(self, name, state[name].to(device, copy=True))
        seed_P = state["seed_P"].to(device)
        self.seed_point_Q = (seed_P >= 0).nonzero()[:, 0]  # ascending, as they were found
        self.seed_cluster_Q = seed_P[self.seed_point_Q]
        self._comparing.put_away()
        self._comparing.recount()
        self._summed = (0, 0)
        if state["cut"] == self._cut():
            self.done = state["done"]
            return True
        self.done = self._phases().index(state["phase"])
        return False
