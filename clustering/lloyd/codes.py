"""The points' codes, made once where there is memory for them, and the question where comparing by codes pays.

Legend: P points of this rank, b of a block, s centres, D embedding size, E bytes of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.nearest.by_codes import COLUMNS, nearest_by_codes_
from clustering.nearest.codes import CodedCentres, Codes, Rotation, code_centres, code_points
from clustering.nearest.nearest import Nearest
from clustering.service.rows import UnitRows

_KEPT_BYTES = 1 << 30
"""Codes of the points take this much memory at most; where they need more, they are made whenever needed."""
_CLUSTERS, _DIM = 512, 96
"""With fewer, a product in float32 is about as fast. So it is with fewer _POINTS, for which centres are coded in vain,
and with fewer centres."""
_POINTS, _CENTRES, _CENTRES_IF_NOT_KEPT = 1024, 128, 1024
_PATIENCE = 8
"""So many pieces with too many candidates, a quarter of all, and no further one is tried."""


def codes_pay(dim: int, clusters: int) -> bool:
    """On a CPU that multiplies codes twice as fast as float32."""
    return dim >= _DIM and clusters >= _CLUSTERS


class PointCodes:
    """Of one run of k-means, on CPUs."""

    def __init__(self, rows: UnitRows, *, always: bool) -> None:
        """always: whether it pays or not."""
        self._rotation = Rotation(rows.dim)
        self._always = always
        P, E = len(rows), self._rotation.width
        self._kept_P: Codes | None = None
        if P * E <= _KEPT_BYTES:
            self._kept_P = Codes(torch.empty(P, E, dtype=torch.uint8), torch.zeros(P))  # a step of 0: not made yet
        self._pieces = self._crowded = 0

    def pay(self, points: int, centres: int) -> bool:
        """Whether to compare so many by codes."""
        if self._always:
            return True
        least = _CENTRES if self._kept_P else _CENTRES_IF_NOT_KEPT
        patient = self._crowded < _PATIENCE or 4 * self._crowded < self._pieces
        return points >= _POINTS and centres >= least and patient

    def of_centres(self, centres_sD: Tensor) -> CodedCentres:
        return code_centres(centres_sD, self._rotation.turned, tile=COLUMNS)

    def of_points(self, point_b: Tensor, x_bD: Tensor) -> Codes:
        """point_b: int64 places of the rows x_bD, which no other thread asks for at the same time."""
        if self._kept_P is None:
            return code_points(self._rotation.turned(x_bD))
        codes_b = self._kept_P[point_b]
        if bool((codes_b.step_b == 0).any()):
            codes_b = code_points(self._rotation.turned(x_bD))
            self._kept_P.code_bE[point_b], self._kept_P.step_b[point_b] = codes_b.code_bE, codes_b.step_b
        return codes_b

    def compare_(
        self,
        state: Nearest,
        point_b: Tensor,
        x_bD: Tensor,
        centres_sD: Tensor,
        coded: CodedCentres,
        cluster_s: Tensor,
    ) -> None:
        """`nearest.nearest_`."""
        told_apart = nearest_by_codes_(state, x_bD, self.of_points(point_b, x_bD), centres_sD, coded, cluster_s)
        self._pieces += 1
        self._crowded += not told_apart
