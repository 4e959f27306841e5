"""Products of projections, exact or by codes, for `clustering.nearest.by_projection`.

Legend: b points of a block, n of some rows of it, s centres, t of a tile, D embedding size, d dimensions of the
subspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clustering.nearest.codes import CodedCentres, Codes, code_centres, code_points

_COLUMNS = 512
_CODED_COLUMNS = 1024
"""Of a tile on a CPU."""


@dataclass(frozen=True, slots=True)
class ProjectedPoints:
    """Projections of points."""

    head: Tensor | Codes
    """float32 (b, d), or codes of it."""
    kept_b: Tensor
    """float32: how much of each point's square length the projection keeps."""

    def __getitem__(self, part: slice | Tensor) -> ProjectedPoints:
        return ProjectedPoints(self.head[part], self.kept_b[part])

    def fill_(self, part: slice, other: ProjectedPoints) -> None:
        """Those of the same kind, in place."""
        if isinstance(self.head, Codes) and isinstance(other.head, Codes):
            self.head.code_bE[part], self.head.step_b[part] = other.head.code_bE, other.head.step_b
        elif isinstance(self.head, Tensor) and isinstance(other.head, Tensor):
            self.head[part] = other.head
        self.kept_b[part] = other.kept_b


class ProjectedCentres(Protocol):
    """Projections of centres."""

    def unit(self, points: ProjectedPoints) -> tuple[Tensor, Tensor]:
        """What one is in the tiles, and how far they may be off then, float32 (b,) both."""

    def tiles(self, points: ProjectedPoints) -> Iterator[tuple[int, Tensor]]:
        """Of each tile the place of its first centre, and the products, float32 (b, t), valid until the next."""


class PlainProjections:
    """float32."""

    def __init__(self, head_sd: Tensor) -> None:
        self._head_sd = head_sd

    def unit(self, points: ProjectedPoints) -> tuple[Tensor, Tensor]:
        return torch.ones_like(points.kept_b), torch.zeros_like(points.kept_b)

    def tiles(self, points: ProjectedPoints) -> Iterator[tuple[int, Tensor]]:
        assert isinstance(points.head, Tensor)
        buffer = torch.empty(len(points.head) * _COLUMNS)
        for left in range(0, len(self._head_sd), _COLUMNS):
            tile_td = self._head_sd[left : left + _COLUMNS]
            shape = (len(points.head), len(tile_td))
            yield left, torch.mm(points.head, tile_td.T, out=buffer[: shape[0] * shape[1]].view(shape))


class CodedProjections:
    """By codes. The subspace is random by itself: nothing is turned before it is rounded."""

    def __init__(self, head_sd: Tensor) -> None:
        self._coded: CodedCentres = code_centres(head_sd, lambda head_td: head_td, tile=_CODED_COLUMNS)

    def unit(self, points: ProjectedPoints) -> tuple[Tensor, Tensor]:
        assert isinstance(points.head, Codes)
        return 1 / points.head.step_b, self._coded.errors(points.head)

    def tiles(self, points: ProjectedPoints) -> Iterator[tuple[int, Tensor]]:
        assert isinstance(points.head, Codes)
        return self._coded.products(points.head)


def project_points(head_bd: Tensor, *, codes: bool) -> ProjectedPoints:
    """As `CodedProjections` or `PlainProjections` take them; head_bd may be overwritten."""
    kept_b = head_bd.square().sum(1).clamp_max_(1)
    return ProjectedPoints(code_points(head_bd) if codes else head_bd, kept_b)
