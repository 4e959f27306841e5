"""What an optimizer of class centres has before it in one step: gradients that wait, and what lies in .grad.

Legend: as in `partial_fc.tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partial_fc import kernels
from partial_fc.deferred import CentreGradient, union_of
from partial_fc.tiles import SampledRows, Tile, tiles_of

_PLAIN_TILE = 1 << 21
"""Numbers of a tile where a plain .grad is applied."""


class CentreGradientError(RuntimeError):
    """Gradients of class centres that this optimizer cannot apply."""


class CentreWork:
    """A parameter's gradients of this step, tile by tile: deferred ones, and what lies in .grad."""

    def __init__(self, p: Tensor, waiting: list[CentreGradient]) -> None:
        self.p = p
        self.sampled: SampledRows | None = None
        self.subcentres, self.step, self.first_class = 1, max(1, _PLAIN_TILE // max(1, p.shape[1])), 0
        grad = p.grad
        self.values_SD = None if grad is None or grad.is_sparse else grad
        self.rows_S: Tensor | None = None
        if grad is not None and grad.is_sparse:
            if not waiting:
                grad = grad.coalesce()  # a host sync
            self.rows_S, self.values_SD = grad._indices()[0], grad._values()
            self.sampled = SampledRows(self.rows_S, len(self.rows_S), 0)
        self.gradients: list[CentreGradient] = []
        if waiting:
            self._take(waiting)

    def _take(self, waiting: list[CentreGradient]) -> None:
        math = waiting[0].math
        if any(gradient.version != self.p._version for gradient in waiting):
            raise CentreGradientError(
                "class centres were changed between the loss and the optimizer's step, which still needs them as they "
                "were: change them after the step, or build the optimizer with fused=False"
            )
        self.sampled = waiting[0].sampled
        if self.sampled is not None and len(waiting) > 1:
            self.sampled = union_of([gradient.sampled for gradient in waiting if gradient.sampled], math.size)
            waiting = [gradient.over(self.sampled) for gradient in waiting]
        if self.sampled is not None and self.values_SD is not None and self.rows_S is None:
            raise CentreGradientError(
                "class centres have a dense gradient beside the sampled softmax's: build the optimizer with fused=False"
            )
        self.gradients, self.subcentres = waiting, math.settings.subcentres
        self.first_class = math.settings.first_class
        self.step = math.settings.tile(math.x_ND)

    def global_rows(self, tile: Tile) -> Tensor:
        """int64 (k,): rows of the tile, counted over all ranks."""
        classes_c = tile.classes_c
        if classes_c is None:
            classes_c = torch.arange(tile.start, tile.stop, device=self.p.device)
        return (
            (classes_c + self.first_class)[:, None] * self.subcentres
            + torch.arange(self.subcentres, device=self.p.device)
        ).flatten()

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(len(self.p) // self.subcentres, self.step, self.sampled)

    def add_(self, tile: Tile, raw_kD: Tensor, out_kD: Tensor, keep: float) -> Tensor:
        """out = keep out + gradient, but for - radial_k1 raw_kD, which is left to the caller. Returns radial_k1."""
        radial_k = raw_kD.new_zeros(len(raw_kD))
        for gradient in self.gradients:
            radial_k.add_(gradient.add_(out_kD, tile, raw_kD, keep))
            keep = 1.0
        if self.values_SD is not None:
            if keep != 1.0:
                out_kD.mul_(keep)
            self._add_values(tile, out_kD)
        return radial_k[:, None]

    def _add_values(self, tile: Tile, out_kD: Tensor) -> None:
        assert self.values_SD is not None
        K = self.subcentres
        if self.rows_S is None or not self.gradients:
            out_kD.add_(self.values_SD[tile.start * K : tile.stop * K])
        else:  # rows of .grad beside the softmax's own (the alignment loss): their classes took part in the softmax too
            tile.add_rows(out_kD, self.rows_S, self.values_SD, K)

    @property
    def by_kernels(self) -> bool:
        """Whether the Triton kernels can do all of it."""
        plain_dense = self.values_SD is not None and self.rows_S is None
        return bool(self.gradients) and all(g.by_kernels for g in self.gradients) and not plain_dense

    def update_by_kernels(self, rule: kernels.Sgd | kernels.AdamW, key: int, skip: Tensor | None) -> None:
        """skip: as `kernels.update` takes it."""
        rows_S = None if self.sampled is None else self.sampled.rows_S
        extra = None if self.rows_S is None or self.values_SD is None else (self.rows_S, self.values_SD)
        batches = [gradient.for_kernels(self.p) for gradient in self.gradients]
        kernels.update(batches, rows_S, rule, key=key, first_row=self.first_class, extra=extra, skip=skip)
        torch.autograd.graph.increment_version(self.p)
