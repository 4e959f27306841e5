"""Sums of points by cluster that are exact, so that neither their order nor the number of ranks changes a bit.

Numbers are rounded to a grid of 2^-g first, g = 52 - bits of the number of points: then sums of all of them, and every
difference on the way, are whole multiples of it that float64 holds without rounding. With a million points the grid is
2^-32, a sixteenth of the step of float32 at the size of a number in 512 dimensions; with 17 million, about such a step,
which the mean of a cluster averages out. Points that change their cluster are taken from one sum and added to another.

Legend: P points of this rank, Q points that move, S clusters of a shard, D embedding size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.nearest.float64_rows import move_, row_dots
from clustering.service.rows import Rows
from clustering.service.shards import sum_rows_
from sharding import all_shards

_AT_ONCE = {"cpu": 256, "cuda": 1 << 17}
_LEVELS = 1 << 32
"""Of a cosine in a sum over points: 2^30 points fit int64."""


def exact_sum(cosine_P: Tensor) -> Tensor:
    """Sum of cosines in steps of 2^-32, int64 scalar: exact from there on."""
    return (cosine_P * _LEVELS).round().long().sum()


def from_steps(total: int) -> float:
    return total / _LEVELS


class ClusterSums:
    """Of every cluster of this rank's shard, the sum of its points on all ranks."""

    def __init__(self, *, num_clusters: int, dim: int, points: int, group: dist.ProcessGroup, device: torch.device):
        """points: of all ranks."""
        self._rank, self._group = dist.get_rank(group), group
        self._shards = all_shards(dist.get_world_size(group), num_clusters)
        self._sums_SD = torch.zeros(self._shards[self._rank].size, dim, dtype=torch.float64, device=device)
        # Added and taken off again, it rounds to the grid.
        self._rounder = 1.5 * 2.0 ** max(points.bit_length(), 12)

    def move_(self, rows: Rows, point_Q: Tensor, old_Q: Tensor, new_Q: Tensor) -> None:
        """Take points from their old clusters' sums and add them to the new ones'; -1: none. int64 (Q,), each.

        Collectives: one reduce of (S, D) float64 a rank; none on one rank.
        """
        for rank, shard in enumerate(self._shards):
            alone = len(self._shards) == 1
            sums_SD = self._sums_SD if alone else self._sums_SD.new_zeros(shard.size, self._sums_SD.shape[1])
            leaves_Q = (old_Q >= shard.start) & (old_Q < shard.stop)
            enters_Q = (new_Q >= shard.start) & (new_Q < shard.stop)
            for part_q in (leaves_Q | enters_Q).nonzero()[:, 0].split(_AT_ONCE[sums_SD.device.type]):
                old_q, new_q = old_Q[part_q] - shard.start, new_Q[part_q] - shard.start
                move_(sums_SD, rows.take(point_Q[part_q]), old_q, new_q, self._rounder)
            if not alone:
                sum_rows_(sums_SD, rank, self._group)
                if rank == self._rank:
                    self._sums_SD += sums_SD

    def unit_means(self, counts_S: Tensor, otherwise_SD: Tensor) -> Tensor:
        """Sums scaled to unit length, float32; a cluster without a point, or whose points cancel, keeps its row."""
        row_S = torch.arange(len(self._sums_SD), device=self._sums_SD.device)
        length_S1 = row_dots(self._sums_SD, None, self._sums_SD, row_S).sqrt()[:, None]
        defined_S1 = (counts_S > 0)[:, None] & (length_S1 > 0)
        return torch.where(defined_S1, (self._sums_SD / length_S1).float(), otherwise_SD)
