"""Mini-batch k-means: each iteration moves the centres by a share of the rows, for what is too large for full passes.

A batch is drawn by a hash of (seed, iteration, row): the same rows on any number of ranks. Its rows are assigned to the
nearest centre and added to the sums that all batches so far have left; a centre is the unit mean of all rows it was
ever given. That is the rate 1 / count for each centre of Sculley (2010): of unit rows, a step of that rate towards each
row is what adding it to the sum does. Early rows thus weigh as much as late ones, and centres come to rest. Clusters
that no row was given yet start anew as in full passes (`clustering.lloyd.repair`).

Legend: P rows of this rank, b of them in the batch, D embedding size, S centres of this rank's shard, K clusters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.lloyd.lloyd import Iteration, Lloyd
from clustering.lloyd.repair import gather_rows, seeds
from clustering.service.rows import Rows, TensorRows
from clustering.service.shards import sum_rows_, unit_or
from partial_fc.collectives import all_reduce_
from partial_fc.sampling import drawn_classes
from sharding import all_shards, shard_of

_FIXED_ONE = 2.0**32
"""1 in the sums: whole numbers, so exact in any order. 2^31 rows of length 1 fit."""
_AT_ONCE = 1 << 12


class MiniBatch:
    """`iterate()` draws a batch, assigns it and moves the centres."""

    def __init__(
        self,
        rows: Rows,
        *,
        centres_SD: Tensor,
        num_clusters: int,
        group: dist.ProcessGroup,
        total: int,
        batch: int,
        seed: int,
        product_dtype: torch.dtype,
    ) -> None:
        """rows: this rank's range of `total` by `sharding.shard_of`. centres_SD: its shard, float32 unit rows; copied.

        batch: rows of all ranks in an iteration, at most total. No collective.
        """
        self.rows, self.num_clusters, self.group = rows, num_clusters, group
        self.centres_SD = centres_SD.clone()
        self.sums_SD = torch.zeros(centres_SD.shape, dtype=torch.int64, device=centres_SD.device)
        """In steps of 2^-32: what the rows so far add up to. Saved and loaded with the counts."""
        self.counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=centres_SD.device)
        self.number = 0
        """Iterations done. Set it with sums and counts to go on where they were saved."""
        self._total, self._batch, self._seed, self._dtype = total, batch, seed, product_dtype
        self._rank = dist.get_rank(group)

    @torch.no_grad()
    def iterate(self) -> Iteration:
        """One batch; what is said of it holds for its rows alone, `moved` counts all of them.

        Collectives: those of `Lloyd.assign`, one all-reduce of W int64, one of K int64, one reduce of (S, D) int64 for
        each rank, and those of `seeds`.
        """
        self.number += 1
        point_b = self._drawn()
        batch = TensorRows(self.rows.take(point_b))
        first = self._rows_before(len(point_b))
        lloyd = Lloyd(
            batch,
            centres_SD=self.centres_SD,
            num_clusters=self.num_clusters,
            group=self.group,
            first_row=first,
            bounds=False,
            product_dtype=self._dtype,
        )
        done = lloyd.assign()
        self._add(batch, lloyd.index_P)
        sums_SD = self.sums_SD.double()
        self.centres_SD = unit_or(sums_SD, self.centres_SD.double()).float()
        cluster_J, row_J = seeds(lloyd.best_P, lloyd.index_P, self.counts_K, first_row=first, group=self.group)
        x_JD = gather_rows(batch, row_J, first_row=first, group=self.group)
        own = shard_of(self._rank, dist.get_world_size(self.group), self.num_clusters)
        mine_J = (cluster_J >= own.start) & (cluster_J < own.stop)
        self.centres_SD[cluster_J[mine_J] - own.start] = x_JD[mine_J]
        return Iteration(
            number=self.number,
            mean_cosine=done.mean_cosine,
            moved=done.moved,
            empty=int((self.counts_K == 0).sum()),
            compared=done.compared,
            seconds=done.seconds,
        )

    def _drawn(self) -> Tensor:
        shard = shard_of(self._rank, dist.get_world_size(self.group), self._total)
        device, rate = self.centres_SD.device, self._batch / self._total
        drawn_P = drawn_classes(shard, self._total, rate, seed=self._seed, step=self.number, device=device)
        return drawn_P.nonzero()[:, 0]

    def _rows_before(self, mine: int) -> int:
        """Rows of the batch on the ranks before this one."""
        counts = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=self.centres_SD.device)
        counts[self._rank] = mine
        return int(all_reduce_(counts, self.group)[: self._rank].sum())

    def _add(self, batch: TensorRows, index_b: Tensor) -> None:
        counts_K = torch.bincount(index_b[index_b >= 0], minlength=self.num_clusters)
        self.counts_K += all_reduce_(counts_K, self.group)
        for rank, shard in enumerate(all_shards(dist.get_world_size(self.group), self.num_clusters)):
            sums_SD = self.sums_SD.new_zeros(shard.size, batch.dim)
            inside_b = (index_b >= shard.start) & (index_b < shard.stop)
            for part_q in inside_b.nonzero()[:, 0].split(_AT_ONCE):
                steps_qD = (batch.take(part_q).double() * _FIXED_ONE).round_().long()
                sums_SD.index_add_(0, index_b[part_q] - shard.start, steps_qD)
            sum_rows_(sums_SD, rank, self.group)
            if rank == self._rank:
                self.sums_SD += sums_SD
