"""Gradients of class centres that are not computed in backward but by the optimizer, tile by tile as it applies them.

The gradient of C centres is a function of the batch, N rows, and of the centres: to keep it for later, its makings are
enough. An optimizer of `partial_fc.optim` declares that it takes them (`accept`); the softmax's backward then leaves a
`CentreGradient` with the parameter and no `.grad`. No array (C, D) is ever made for the gradient, accumulation over
micro-batches keeps a list, and a tile of centres is read, changed and written once.

Legend: as in `partial_fc.tiles`; U classes that any of several batches took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc import kernels
from partial_fc.links import attach, attached
from partial_fc.products import add_product_
from partial_fc.tiles import SampledRows, Tile, TileMath, position_of

_NAME = "_deferred_gradients"
Kept = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Cosines (k, N) and inverse lengths (k,) of tiles, by their start and stop."""


@dataclass(frozen=True, slots=True)
class CentreGradient:
    """Makings of one batch's gradient of this rank's centres."""

    math: TileMath
    sampled: SampledRows | None
    target_N: Tensor
    """int64: the target's class in this shard, -1 where another rank owns it."""
    by_N: Tensor
    at_target_N: Tensor
    """Both as `TileMath.gradient` takes them."""
    kept: Kept
    """Of some tiles."""
    version: int
    """The parameter's at the time: the makings mean nothing for other centres."""
    by_kernels: bool
    """Whether the Triton kernels are to make the gradient."""
    member_U: Tensor | None = None
    """Of the union of several batches' classes: those that this one took. The others get no gradient from it."""

    def over(self, union: SampledRows | None) -> CentreGradient:
        """The same gradient, for tiles of the union of several batches' classes."""
        if union is None or self.sampled is None:
            return self
        own_S = torch.cat([self.sampled.rows_S, self.sampled.rows_S.new_full((1,), self.math.size)])
        return dataclasses.replace(
            self,
            math=self.math.at(position_of(self.target_N, union)),
            sampled=union,
            kept={},
            member_U=own_S[torch.searchsorted(own_S, union.rows_S)] == union.rows_S,
        )

    def add_(self, out_kD: Tensor, tile: Tile, raw_kD: Tensor, keep: float) -> Tensor:
        """out = keep out + g_kN x_ND; returns radial_k (k,): the gradient lacks - radial_k raw_kD."""
        found = self.kept.pop((tile.start, tile.stop), None)
        cosine_kN, inverse_k = self.math.cosines(raw_kD) if found is None else found
        g_kN, radial_k = self.math.gradient(tile, cosine_kN, inverse_k, self.by_N, self.at_target_N)
        if self.member_U is not None:
            member_k = self.member_U[tile.start : tile.stop].repeat_interleave(self.math.settings.subcentres)
            g_kN.mul_(member_k[:, None])
            radial_k.mul_(member_k)
        add_product_(out_kD, g_kN, self.math.x_ND, self.math.settings.product_dtype, keep=keep)
        return radial_k

    def for_kernels(self, w_CD: Tensor) -> kernels.CosineGradient:
        """The same, as the kernels take it."""
        rows_S = None if self.sampled is None else self.sampled.rows_S
        if rows_S is not None and self.member_U is not None:
            rows_S = torch.where(self.member_U, rows_S, self.math.size)
        terms = self.math.for_kernels(w_CD, self.target_N, rows_S)
        return kernels.CosineGradient(terms=terms, by_N=self.by_N, at_target_N=self.at_target_N)


def union_of(samples: Sequence[SampledRows], size: int) -> SampledRows:
    """The classes of several batches. No host sync: padding makes up for what is counted twice."""
    taken = torch.zeros(size + 1, dtype=torch.bool, device=samples[0].rows_S.device)  # one place more, for padding
    for sample in samples:
        taken.index_fill_(0, sample.rows_S, True)
    draws = {sample.draw: sample.sure for sample in samples}  # micro-batches of a step draw the same classes
    most = sum(draws.values()) + sum(len(sample.rows_S) - sample.sure for sample in samples)
    rows_U = torch.nonzero_static(taken[:-1], size=min(size, most), fill_value=size)[:, 0]
    return SampledRows(rows_U, max(draws.values()), -1)


class Waiting(list[CentreGradient]):
    """A parameter's gradients that wait for their optimizer."""

    def room(self, limit: int, *, sampled: bool) -> int:
        """Bytes that the next batch may keep, of a limit that all batches of a step share."""
        if sampled and self:
            return 0  # the union of several batches' classes is cut into other tiles
        return limit - sum(cosine_kN.nbytes for gradient in self for cosine_kN, _ in gradient.kept.values())

    def add(self, gradient: CentreGradient) -> None:
        self.append(gradient)
        if gradient.sampled is not None and len(self) > 1:
            for one in self:
                one.kept.clear()


class Defer(torch.autograd.Function):
    """The weight itself. When a backward pass reaches it, the gradients that the softmax has made ready begin to wait.

    A backward pass that stops short of the weight (torch.autograd.grad of the embeddings alone) leaves none.
    """

    @staticmethod
    def forward(ctx: Any, w_RD: Tensor, ready: list[CentreGradient], waiting: Waiting) -> Tensor:
        ctx.ready, ctx.waiting = ready, waiting
        return w_RD.view_as(w_RD)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        for gradient in ctx.ready:
            ctx.waiting.add(gradient)
        ctx.ready.clear()
        return None, None, None


def accept(parameter: Tensor, waiting: Waiting | None) -> None:
    """From now on the softmax puts this parameter's gradients there, for as long as the list lives; None: into .grad.

    For optimizers that apply them.
    """
    attach(parameter, _NAME, waiting)


def deferred(parameter: Tensor) -> Waiting | None:
    """The gradients that wait; None when nobody has declared to take them."""
    waiting = attached(parameter, _NAME)
    return waiting if isinstance(waiting, Waiting) else None
