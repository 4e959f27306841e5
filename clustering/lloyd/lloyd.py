"""Full iterations of spherical k-means over all ranks, exact, without the comparisons that can be told to be needless.

What is computed is that of `clustering.lloyd.reference`. Points lie anywhere, centres are sharded by cluster and shown
shard by shard. Cosines near each other are decided in float64 (`clustering.nearest.nearest`), sums of points are exact
(`clustering.lloyd.sums`), so assignments and centres are the same bits on any number of ranks. Of an iteration's N x K
comparisons two kinds are left out: those with centres that moved little (`clustering.nearest.bounds`, for certain), and
those with centres whose projection is too far off (`clustering.nearest.by_projection`, but for one pair in 3 million;
on CPUs). On CPUs products of small whole numbers find who may be nearest (`clustering.nearest.by_codes`), in 0.65 of
float32's time.

Legend: P points of this rank, Q of them that moved, S centres of its shard, K clusters of all ranks, D embedding size,
J clusters that start anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.lloyd.assign import Assigner
from clustering.lloyd.checks import agree, problem_of_centres
from clustering.lloyd.repair import gather_rows, seeds
from clustering.lloyd.sums import ClusterSums, exact_sum, from_steps
from clustering.nearest.bounds import FAR, drift_angles
from clustering.nearest.choice import runs_kernel
from clustering.nearest.nearest import NONE
from clustering.service.rows import Rows, UnitRows
from configs.head import Impl
from partial_fc.collectives import all_reduce_
from sharding import shard_of

_BLOCK = {"cpu": 1 << 12, "cuda": 8 * 132 * 128}
"""On GPUs few, as the host waits for each: eight rounds of an H100's 132 cores at 128 points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """What one iteration did, over all ranks; but for the time, the same on each."""

    number: int
    """From 1."""
    mean_cosine: float
    """Of all points with a cluster to its centre, before the centres moved."""
    moved: int
    """Points whose cluster changed."""
    empty: int
    """Clusters without a point, before repair."""
    compared: float
    """Work of the comparisons over that of all points with all centres; a projection counts by its dimensions."""
    seconds: float
    """On this rank."""


class Lloyd:
    """`iterate()` assigns every point to its nearest centre and moves the centres to their members' unit means."""

    def __init__(
        self,
        rows: Rows,
        *,
        centres_SD: Tensor,
        num_clusters: int,
        group: dist.ProcessGroup,
        first_row: int = 0,
        bounds: bool = True,
        projection: bool = True,
        codes: bool | None = None,
        impl: Impl = "auto",
        product_dtype: torch.dtype = torch.float32,
        block: int | None = None,
    ) -> None:
        """rows: this rank's, a contiguous range of all ranks' rows that begins at first_row. centres_SD: this rank's
        shard of the centres to start from, by `sharding.shard_of`: float32 (S, D), unit rows, or zero rows, which
        attract nothing until they start anew as empty clusters do; copied.

        bounds, projection: leave comparisons out. codes: find candidates by products of codes, on CPUs where torch has
        them; None: where it pays. impl: "triton" or "auto" for the kernel on GPUs. product_dtype: bfloat16 products
        find the candidates; which is nearest is decided as with float32. block: points at a time at most; if None, 4096
        on CPUs, where every thread takes some, and 135168 on GPUs.

        Raises ValueError for centres or sizes that do not fit, on all ranks. Collectives: two all-reduces.
        """
        self.rows, self.group, self.num_clusters, self.first_row = UnitRows(rows), group, num_clusters, first_row
        self._own = shard_of(dist.get_rank(group), dist.get_world_size(group), num_clusters)
        device = centres_SD.device
        block = block if block is not None else _BLOCK.get(device.type, 4096)
        agree(problem_of_centres(centres_SD, self._own, num_clusters, rows.dim, block), group, device)
        P = len(rows)
        self.total = int(all_reduce_(torch.tensor(P, device=device), group))
        """Points of all ranks."""
        self.centres_SD = centres_SD.clone()
        """float32: this rank's shard, as the last iteration left it."""
        self.index_P = torch.full((P,), -1, dtype=torch.int64, device=device)
        """int64: each point's cluster in the last assignment; -1: a zero row, or no centre existed."""
        self.best_P = torch.full((P,), NONE, dtype=torch.float64, device=device)
        """float64: its cosine to that cluster's centre; -inf: none."""
        self.number = 0
        """Iterations done."""
        self._bounds = bounds
        self._assigner = Assigner(
            self.rows,
            num_clusters=num_clusters,
            first_row=first_row,
            total=self.total,
            group=group,
            device=device,
            bounds=bounds,
            projection=projection,
            codes=codes,
            kernels=runs_kernel(impl, centres_SD),
            dtype=product_dtype,
            block=block,
        )
        sizes = {"num_clusters": num_clusters, "dim": rows.dim, "points": self.total}
        self._sums = ClusterSums(**sizes, group=group, device=device)
        self._counts_K = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        self._drift_K = torch.full((num_clusters,), FAR, device=device)

    @torch.no_grad()
    def iterate(self) -> Iteration:
        """Assign, start empty clusters anew, move the centres.

        Raises ValueError for rows that are neither of unit length nor zero, on all ranks, in the first iteration.

        Collectives: those of `assign`; with empty clusters, two all-reduces for their seeds; with bounds, one of K
        float32.
        """
        begin = time.perf_counter()
        done = self._assign()
        self.number += 1
        old_SD, own = self.centres_SD, self._own
        self.centres_SD = self._sums.unit_means(self._counts_K[own.start : own.stop], old_SD)
        cluster_J, row_J = seeds(self.best_P, self.index_P, self._counts_K, first_row=self.first_row, group=self.group)
        x_JD = gather_rows(self.rows, row_J, first_row=self.first_row, group=self.group)
        mine_J = (cluster_J >= own.start) & (cluster_J < own.stop)
        self.centres_SD[cluster_J[mine_J] - own.start] = x_JD[mine_J]
        if self._bounds:
            self._drift_K = self._drift_K.new_zeros(self.num_clusters)
            self._drift_K[own.start : own.stop] = drift_angles(old_SD, self.centres_SD)
            all_reduce_(self._drift_K, self.group)
        return self._report(done, begin)

    @torch.no_grad()
    def assign(self) -> Iteration:
        """Assign every point to the nearest of the centres as they are now; they stay.

        Collectives: one broadcast of a shard's centres for each rank, two or three times; one reduce of (S, D) float64
        for each rank; all-reduces of K int64 and of a few numbers.
        """
        begin = time.perf_counter()
        done = self._assign()
        self._drift_K.zero_()
        return self._report(done, begin)

    def _report(self, done: tuple[int, int, int, int], begin: float) -> Iteration:
        cosines, counted, moved, compared = done
        return Iteration(
            number=self.number,
            mean_cosine=from_steps(cosines) / max(1, counted),
            moved=moved,
            empty=int((self._counts_K == 0).sum()),
            compared=compared / max(1, self.total * self.num_clusters),
            seconds=time.perf_counter() - begin,
        )

    def _assign(self) -> tuple[int, int, int, int]:
        """Sum of cosines in steps, points with a cluster, points that moved, work; over all ranks."""
        old_P = self.index_P
        found, work = self._assigner.assign(self.centres_SD, old_P, self._drift_K)
        self.index_P, self.best_P = found.index_b, found.best_b
        point_Q = (self.index_P != old_P).nonzero()[:, 0]
        self._sums.move_(self.rows, point_Q, old_P[point_Q], self.index_P[point_Q])
        has_P = self.index_P >= 0
        self._counts_K = all_reduce_(torch.bincount(self.index_P[has_P], minlength=self.num_clusters), self.group)
        summary = [int(exact_sum(self.best_P[has_P])), int(has_P.sum()), len(point_Q), work]
        totals = torch.tensor(summary, device=has_P.device)
        cosines, counted, moved, compared = all_reduce_(totals, self.group).tolist()
        return cosines, counted, moved, compared
