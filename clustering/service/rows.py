"""Where the points of a stand-alone k-means lie: in memory here, in files elsewhere, behind the same three calls.

Legend: P rows of this rank, D embedding size, Q rows asked for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from clustering.nearest.float64_rows import row_dots


class Rows(Protocol):
    """The points of one rank, a contiguous range of all rows. No method runs a collective.

    A row is of unit length, or zero: a point without direction, which belongs to no cluster and is never counted.
    """

    @property
    def dim(self) -> int:
        """D."""

    def __len__(self) -> int:
        """P."""

    def block(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1, (stop - start, D), float32, float64 or bfloat16, on the device that computes."""

    def take(self, index_Q: Tensor) -> Tensor:
        """Rows in any order, (Q, D), as `block` gives them. index_Q: int64, on the device that computes."""


class TensorRows:
    """Rows of a tensor (P, D)."""

    def __init__(self, x_PD: Tensor) -> None:
        """Raises ValueError for a tensor that is not a matrix of floating-point numbers."""
        if x_PD.dim() != 2 or not x_PD.is_floating_point():
            raise ValueError(f"expected rows of floating-point numbers (P, D), got {x_PD.dtype} {tuple(x_PD.shape)}")
        self._x_PD = x_PD

    @property
    def dim(self) -> int:
        return self._x_PD.shape[1]

    def __len__(self) -> int:
        return len(self._x_PD)

    def block(self, start: int, stop: int) -> Tensor:
        return self._x_PD[start:stop]

    def take(self, index_Q: Tensor) -> Tensor:
        return self._x_PD.index_select(0, index_Q)


class UnitRows:
    """Other rows as float32, those of bfloat16 scaled to unit length again: their rounding takes a thousandth off."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def dim(self) -> int:
        return self._rows.dim

    def __len__(self) -> int:
        return len(self._rows)

    def block(self, start: int, stop: int) -> Tensor:
        return _unit(self._rows.block(start, stop))

    def take(self, index_Q: Tensor) -> Tensor:
        return _unit(self._rows.take(index_Q))

    def pick(self, point_Q: Tensor) -> Tensor:
        """`take` of distinct rising rows, or `block` where they lie side by side."""
        if not len(point_Q):
            return self.block(0, 0)
        first, last = int(point_Q[0]), int(point_Q[-1])
        return self.block(first, last + 1) if last - first + 1 == len(point_Q) else self.take(point_Q)


def _unit(x_QD: Tensor) -> Tensor:
    if x_QD.dtype != torch.bfloat16:
        return x_QD.float()
    x_QD = x_QD.float()
    row_Q = torch.arange(len(x_QD), device=x_QD.device)
    length_Q1 = row_dots(x_QD, None, x_QD, row_Q).sqrt()[:, None]
    return torch.where(length_Q1 > 0, x_QD / length_Q1.float(), x_QD)
