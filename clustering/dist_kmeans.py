"""Spherical k-means over all ranks, cut into slices that fit between training steps, and resumable at any slice.

Points lie with the owner of their class, centres are sharded by cluster. What is computed is that of
`clustering.kmeans`, read there first. An iteration is cut like this:

- assign: for each rank r its centres are broadcast once, and every rank compares its own points with them, `block`
  points a slice, keeping the best so far. Ranks without points left do nothing, yet every rank counts the same slices;
- seed: gate, counts and seeds, one slice;
- mean: for each rank r one slice: partial sums are reduced to r.

Points first seen by the training after a run began take no part in it.

Legend: P points of this rank, b points of a block, S centres of a shard, s centres of a tile, D embedding size,
K clusters, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.bank import Points
from clustering.kmeans import FIT_LEVELS, WELL_FITTED, Gate, fit_level
from clustering.shards import add_rows_, show_rows, sum_rows_, unit_or
from partial_fc.collectives import all_reduce_
from sharding import all_shards

_TILE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Cosines of one (b, s) tile: 1 MB of float32 stays in the cache of a CPU core; 256 MB fill a GPU."""
_SAVED = ("centres_SD", "best_P", "index_P", "counted_P", "taking_part_P", "seed_point_Q", "seed_cluster_Q")


def _cosines(x_bD: Tensor, centres_sD: Tensor) -> Tensor:
    if x_bD.dtype == torch.bfloat16:
        return torch.mm(x_bD, centres_sD.to(torch.bfloat16).T, out_dtype=centres_sD.dtype)
    return x_bD @ centres_sD.T


class KMeansRun:
    """One refresh: `advance()` does one slice and says whether more are left."""

    def __init__(
        self,
        *,
        points: Points,
        centres_SD: Tensor | None,
        num_clusters: int,
        num_classes: int,
        iterations: int,
        block: int,
        gate: Gate | None,
        group: dist.ProcessGroup,
    ) -> None:
        """centres_SD: this rank's shard of the centres to start from (copied), or None for the class means.

        Centres are float32, or float64 for points of float64. gate: may run collectives; called once an iteration.
        """
        self.points, self.gate, self.group = points, gate, group
        self.num_classes = num_classes
        self.rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self.shards = all_shards(world_size, num_clusters)
        self.num_clusters, self.block = num_clusters, block
        P, D = points.x_PD.shape
        device = points.x_PD.device
        self.dtype = torch.float64 if points.x_PD.dtype == torch.float64 else torch.float32
        own = self.shards[self.rank]
        self.from_class_means = centres_SD is None
        start_SD = torch.zeros(own.size, D, device=device) if centres_SD is None else centres_SD
        self.centres_SD = start_SD.to(self.dtype, copy=True)
        self.taking_part_P = points.seen_P.clone()
        self.counted_P = self.taking_part_P.clone()
        self.best_P = torch.full((P,), float("-inf"), dtype=self.dtype, device=device)
        self.index_P = torch.where(self.taking_part_P, points.class_P, -1)
        self.seed_point_Q = torch.empty(0, dtype=torch.int64, device=device)
        self.seed_cluster_Q = torch.empty(0, dtype=torch.int64, device=device)
        self._slices = self._plan(iterations, world_size)
        self.done = 0
        self._shown: tuple[int, Tensor] | None = None

    def _plan(self, iterations: int, world_size: int) -> list[tuple[str, int, int]]:
        """(kind, rank, block) of every slice; the same list on all ranks."""
        blocks = -(-self.points.largest // self.block)
        means = [("mean", rank, 0) for rank in range(world_size)]
        passes = [("assign", rank, block) for rank in range(world_size) for block in range(blocks)]
        one = [*passes, ("seed", 0, 0), *means]
        return (means if self.from_class_means else []) + one * iterations

    @property
    def length(self) -> int:
        """Slices in all; the same on every rank."""
        return len(self._slices)

    @torch.no_grad()
    def advance(self) -> bool:
        """Do the next slice; False when none is left afterwards.

        Collectives: assign, one broadcast when its rank's centres are first needed; seed, two all-reduces and
        those of the gate; mean, one reduce.
        """
        kind, rank, block = self._slices[self.done]
        if kind == "assign":
            self._assign(rank, block)
        elif kind == "seed":
            self._seed()
        else:
            self._mean(rank)
        self.done += 1
        return self.done < len(self._slices)

    def _assign(self, rank: int, block: int) -> None:
        if rank == block == 0:
            self.best_P.fill_(float("-inf"))
            self.index_P.fill_(-1)
        # Not saved in a checkpoint: a resumed run shows the same rows again, as they do not change within a pass.
        if self._shown is None or self._shown[0] != rank:
            self._shown = (rank, show_rows(self.centres_SD, self.shards[rank], rank, self.group))
        shown_SD = self._shown[1]
        part = slice(block * self.block, (block + 1) * self.block)
        x_bD, best_b, index_b = self.points.x_PD[part], self.best_P[part], self.index_P[part]
        if not len(x_bD) or not len(shown_SD):
            return
        if not x_bD.is_cuda:  # only GPUs multiply bf16 operands into a float32 result
            x_bD = x_bD.to(self.dtype)
        first = self.shards[rank].start
        for tile_sD in shown_SD.split(max(64, _TILE_NUMBERS[x_bD.device.type] // len(x_bD))):
            cos_bs = _cosines(x_bD, tile_sD).masked_fill_((tile_sD == 0).all(1), float("-inf"))
            cos_b, column_b = cos_bs.max(1)
            better_b = (cos_b > best_b) & self.taking_part_P[part]  # not >=: ties stay with the smaller index
            index_b.copy_(torch.where(better_b, column_b + first, index_b))
            best_b.copy_(torch.where(better_b, cos_b, best_b))
            first += len(tile_sD)

    def _seed(self) -> None:
        self._shown = None
        self.counted_P = self.index_P >= 0 if self.gate is None else self.gate(self.index_P)
        counts_K = torch.bincount(self.index_P[self.counted_P], minlength=self.num_clusters)
        empty_E = (all_reduce_(counts_K, self.group) == 0).nonzero()[:, 0]
        point_Q, level_Q = self._worst_of_each_class()
        rank_Q = self._rank_among_all(level_Q, self.points.class_P[point_Q], len(empty_E))
        planted_Q = rank_Q < len(empty_E)
        self.seed_point_Q = point_Q[planted_Q]
        self.seed_cluster_Q = empty_E[rank_Q[planted_Q]]

    def _worst_of_each_class(self) -> tuple[Tensor, Tensor]:
        """Of each class here, the counted point of lowest fit, the first of equals, if any needs a seed: and its fit.

        Points ascend by class.
        """
        level_P = fit_level(self.best_P)
        point_R = (self.counted_P & (level_P < WELL_FITTED)).nonzero()[:, 0]
        by_fit_R = point_R[level_P[point_R].argsort(stable=True)]
        sorted_R = by_fit_R[self.points.class_P[by_fit_R].argsort(stable=True)]
        class_R = self.points.class_P[sorted_R]
        first_R = torch.ones_like(class_R, dtype=torch.bool)
        first_R[1:] = class_R[1:] != class_R[:-1]
        point_Q = sorted_R[first_R]
        return point_Q, level_P[point_Q]

    def _rank_among_all(self, level_Q: Tensor, class_Q: Tensor, wanted: int) -> Tensor:
        """Place of each candidate in the order (fit, class) over all ranks, `wanted` if beyond. One all-reduce.

        class_Q ascends. int64 (Q,).
        """
        if wanted == 0:
            return torch.zeros_like(class_Q)
        chosen = level_Q.argsort(stable=True)[:wanted]  # a rank's candidates beyond the first `wanted` are never taken
        # An all-gather written as a sum: every rank fills its own row, the others hold zeros there. Levels are
        # shifted above 0, the mark of an empty place.
        table = level_Q.new_zeros(len(self.shards), min(wanted, self.num_classes), 2)
        table[self.rank, : len(chosen), 0] = level_Q[chosen] + FIT_LEVELS + 1
        table[self.rank, : len(chosen), 1] = class_Q[chosen]
        flat = all_reduce_(table, self.group).view(-1, 2)
        flat = flat[flat[:, 0] > 0]
        flat = flat[flat[:, 0].argsort(stable=True)]  # rows come by rank, hence by class: ties to the smaller class
        place_C = level_Q.new_full((self.num_classes,), wanted)
        place_C[flat[:, 1]] = torch.arange(len(flat), device=flat.device)
        return place_C[class_Q]

    def _mean(self, rank: int) -> None:
        shard = self.shards[rank]
        sums_SD = torch.zeros(shard.size, self.points.x_PD.shape[1], dtype=self.dtype, device=self.centres_SD.device)
        inside_P = self.counted_P & (self.index_P >= shard.start) & (self.index_P < shard.stop)
        point_Q = inside_P.nonzero()[:, 0]
        add_rows_(sums_SD, self.index_P[point_Q] - shard.start, self.points.x_PD, point_Q)
        seed_Q = (self.seed_cluster_Q >= shard.start) & (self.seed_cluster_Q < shard.stop)
        add_rows_(sums_SD, self.seed_cluster_Q[seed_Q] - shard.start, self.points.x_PD, self.seed_point_Q[seed_Q])
        sum_rows_(sums_SD, rank, self.group)
        if rank == self.rank:
            self.centres_SD = unit_or(sums_SD, self.centres_SD)

    def state_dict(self) -> dict[str, Any]:
        """Tensors are this run's own, not copies."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _SAVED}
        return {**state, "done": self.done, "from_class_means": self.from_class_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run of the same construction, at the slice where it was saved."""
        device = self.centres_SD.device
        for name in _SAVED:
            setattr(self, name, state[name].to(device, copy=True))
        self.done, self._shown = state["done"], None
