"""The points' codes, made once where there is memory for them.

Legend: P points of this rank, b of a block, s centres, D embedding size, E bytes of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.codes import CodedCentres, Codes, Rotation, code_centres, code_points
from clustering.nearest_codes import COLUMNS
from clustering.rows import UnitRows
from clustering.threads import each

_BLOCK = 1024
_KEPT_BYTES = 1 << 30
"""Codes of the points take this much memory at most; where they need more, they are made when needed."""


class PointCodes:
    """Of one run of k-means, on CPUs."""

    def __init__(self, rows: UnitRows) -> None:
        self._rows = rows
        self._rotation = Rotation(rows.dim)
        self._kept_P: Codes | None = None

    def of_centres(self, centres_sD: Tensor) -> CodedCentres:
        return code_centres(self._rotation.turned(centres_sD), tile=COLUMNS)

    def keep(self, device: torch.device) -> None:
        """Code all points once, where there is memory for it; `of_points` reads it then."""
        if self._kept_P is not None or len(self._rows) * self._rotation.width > _KEPT_BYTES:
            return
        P = len(self._rows)
        kept_P = Codes(torch.empty(P, self._rotation.width, dtype=torch.uint8), torch.empty(P))

        def code(start: int) -> None:
            codes_b = self._made(self._rows.block(start, min(start + _BLOCK, P)))
            kept_P.code_bE[start : start + _BLOCK], kept_P.step_b[start : start + _BLOCK] = (
                codes_b.code_bE,
                codes_b.step_b,
            )

        each(code, range(0, P, _BLOCK), device)
        self._kept_P = kept_P

    def of_points(self, point_b: Tensor, x_bD: Tensor) -> Codes:
        """point_b: int64 places of the rows x_bD."""
        return self._made(x_bD) if self._kept_P is None else self._kept_P[point_b]

    def _made(self, x_bD: Tensor) -> Codes:
        return code_points(self._rotation.turned(x_bD))
