"""The projections of points and centres, and the choice of a subspace that all ranks agree on.

Legend: P points of this rank, b of a block, Q of the sample, s centres shown, D embedding size, d dimensions of the
subspace in use.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.nearest_projection import Projection, Sample, choose, quieten, random_basis, subspaces
from clustering.rows import UnitRows
from clustering.threads import each
from partial_fc.collectives import all_reduce_

_LEAST_CLUSTERS = 128
"""With fewer, a projection of the points costs about as much as the comparisons."""
_SAMPLE, _SHARE = 256, 256
"""At most so many points are looked at, at most one of so many."""
_BLOCK = 4096
_KEPT_BYTES = 1 << 30
"""Projections of the points take this much memory at most; where they need more, they are made when needed."""


class Projections:
    """Of one run of k-means, on CPUs."""

    def __init__(
        self, rows: UnitRows, *, num_clusters: int, first_row: int, total: int, group: dist.ProcessGroup
    ) -> None:
        """total: points of all ranks."""
        self._rows, self._clusters, self._group = rows, num_clusters, group
        size = min(_SAMPLE, total // _SHARE)
        self.worth_a_try = bool(size and num_clusters >= _LEAST_CLUSTERS and subspaces(rows.dim))
        """The same on all ranks."""
        row_Q = torch.arange(size) * total // max(1, size)
        self._sample_Q = row_Q[(row_Q >= first_row) & (row_Q < first_row + len(rows))] - first_row
        self._basis_DE = random_basis(rows.dim) if self.worth_a_try else torch.empty(rows.dim, 0)
        self._kept_Pd: Tensor | None = None
        if self.worth_a_try:
            quieten()

    def sample(self) -> Sample:
        """Of rows that do not depend on the number of ranks."""
        return Sample(self._rows.take(self._sample_Q), self._basis_DE)

    def choose(self, sample: Sample, *, known: bool) -> Projection | None:
        """What pays, or None. One all-reduce."""
        return choose(all_reduce_(sample.table(), self._group), self._rows.dim, self._clusters, known=known)

    def of_centres(self, centres_sD: Tensor, dims: int) -> Tensor:
        """(s, d)."""
        return centres_sD @ self._basis_DE[:, :dims]

    def keep(self, dims: int, device: torch.device) -> None:
        """Project all points once, where there is memory for it; `of_points` reads it then."""
        if len(self._rows) * dims * 4 > _KEPT_BYTES or (self._kept_Pd is not None and self._kept_Pd.shape[1] >= dims):
            return
        kept_Pd = torch.empty(len(self._rows), dims)

        def project(start: int) -> None:
            block_bD = self._rows.block(start, min(start + _BLOCK, len(self._rows)))
            torch.mm(block_bD, self._basis_DE[:, :dims], out=kept_Pd[start : start + len(block_bD)])

        each(project, range(0, len(self._rows), _BLOCK), device)
        self._kept_Pd = kept_Pd

    def of_points(self, point_b: Tensor, x_bD: Tensor, dims: int) -> Tensor:
        """(b, d). point_b: int64 places of the rows x_bD."""
        if self._kept_Pd is None or self._kept_Pd.shape[1] < dims:
            return x_bD @ self._basis_DE[:, :dims]
        return self._kept_Pd[point_b, :dims]
