"""The projections of points and centres, and the choice of a subspace that all ranks agree on.

Legend: P points of this rank, b of a block, Q of the sample, s centres shown, D embedding size, d dimensions of the
subspace in use.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.lloyd.threads import each
from clustering.nearest.by_projection import Projection, Sample, choose, random_basis, subspaces
from clustering.nearest.codes import Codes
from clustering.nearest.projected import (
    CodedProjections,
    PlainProjections,
    ProjectedCentres,
    ProjectedPoints,
    project_points,
)
from clustering.service.rows import UnitRows
from partial_fc.collectives import all_reduce_

_LEAST_CLUSTERS = 128
"""With fewer, a projection of the points costs about as much as the comparisons."""
_SAMPLE, _SHARE = 256, 256
"""At most so many points are looked at, at most one of so many."""
_BLOCK = 1024
_KEPT_BYTES = 1 << 30
"""Projections of the points take this much memory at most; where they need more, they are made when needed."""


class Projections:
    """Of one run of k-means, on CPUs."""

    def __init__(
        self, rows: UnitRows, *, num_clusters: int, first_row: int, total: int, codes: bool, group: dist.ProcessGroup
    ) -> None:
        """total: points of all ranks. codes: products are those of codes, whatever else is compared too."""
        self._codes = codes
        self._rows, self._clusters, self._group = rows, num_clusters, group
        size = min(_SAMPLE, total // _SHARE)
        self.worth_a_try = bool(size and num_clusters >= _LEAST_CLUSTERS and subspaces(rows.dim))
        """The same on all ranks."""
        row_Q = torch.arange(size) * total // max(1, size)
        self._sample_Q = row_Q[(row_Q >= first_row) & (row_Q < first_row + len(rows))] - first_row
        self._basis_DE = random_basis(rows.dim) if self.worth_a_try else torch.empty(rows.dim, 0)
        self._kept_P: ProjectedPoints | None = None
        self._kept_dims = 0

    def sample(self) -> Sample:
        """Of rows that do not depend on the number of ranks."""
        return Sample(self._rows.take(self._sample_Q), self._basis_DE)

    def choose(self, sample: Sample, *, known: bool) -> Projection | None:
        """What pays, or None. One all-reduce."""
        without = torch.tensor([int(not self._codes)])  # a rank whose torch cannot multiply codes
        table = all_reduce_(torch.cat([sample.table(), without]), self._group)
        return choose(table[:-1], self._rows.dim, self._clusters, known=known, codes=not int(table[-1]))

    def of_centres(self, centres_sD: Tensor, dims: int) -> ProjectedCentres:
        head_sd = centres_sD @ self._basis_DE[:, :dims]
        return CodedProjections(head_sd) if self._codes else PlainProjections(head_sd)

    def keep(self, dims: int, device: torch.device) -> None:
        """Project all points once, where there is memory for it; `of_points` reads it then."""
        P = len(self._rows)
        if P * dims * (1 if self._codes else 4) > _KEPT_BYTES or dims == self._kept_dims:
            return
        self._kept_P = None  # before the next one takes its memory
        head = Codes(torch.empty(P, dims, dtype=torch.uint8), torch.empty(P)) if self._codes else torch.empty(P, dims)
        kept_P = ProjectedPoints(head, torch.empty(P))

        def project(start: int) -> None:
            part = slice(start, min(start + _BLOCK, P))
            kept_P.fill_(part, self._made(self._rows.block(part.start, part.stop), dims))

        each(project, range(0, P, _BLOCK), device)
        self._kept_P, self._kept_dims = kept_P, dims

    def of_points(self, point_b: Tensor, x_bD: Tensor, dims: int) -> ProjectedPoints:
        """point_b: int64 places of the rows x_bD."""
        return self._kept_P[point_b] if self._kept_P and self._kept_dims == dims else self._made(x_bD, dims)

    def _made(self, x_bD: Tensor, dims: int) -> ProjectedPoints:
        return project_points(x_bD @ self._basis_DE[:, :dims], codes=self._codes)
