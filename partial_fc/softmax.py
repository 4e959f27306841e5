"""Streaming margin softmax over a shard of class centres: no (N, C) tensor is ever kept.

What makes it stream, and exact:

- Logits of the other classes lie in [-s, s], so exp() needs no running maximum: one constant shift keeps every sum
  inside float32's range (`shift_for`). No max pass, no max all-reduce.
- The margin touches only the target's logit. It is computed beside the tiles (N dot products); inside a tile
  the target's column is simply left out. The loss is softplus(log S + shift - t), with S the sum over the
  *other* classes and t the target's logit: nothing cancels, so well-learned samples keep their precision.
- With a constant shift the unnormalised embedding gradient U = sum_c exp(logit_c) w_c is a by-product of the
  forward pass; dividing by the global S later makes it the gradient. Backward only recomputes tiles for dW.

Four matrix products a step in all, one all-reduce of two floats a row. Centres are normalised tile by tile;
the gradient returned for them is that of the raw rows (tangent to the sphere, over the row's length).

Legend: N rows of the global batch, D embedding size, C centres of this shard (S of them when sampled),
c centres of one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.collectives import all_reduce_
from partial_fc.margins import TargetMargin
from partial_fc.products import product

_MAX_EXPONENT = 85.0  # exp(88.7) is float32's end; the rest is left for the products with S
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Size of one fp32 (N, c) tile: within the L2 cache of a CPU core (measured best there); large products on GPUs."""
_MIN_NORM = 1e-12


def shift_for(scale: float, num_classes: int) -> float:
    """The constant a such that sum_c exp(s cos_c - a) stays below float32's end for any embedding.

    0 for s = 64 up to 10^9 classes. Smaller is better: what underflows is exp(-s - a). Ours.
    """
    return max(0.0, scale + math.log(max(num_classes, 1)) - _MAX_EXPONENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxSettings:
    """What does not change from step to step."""

    scale: float
    num_classes: int
    """Classes of all shards together."""
    margin: TargetMargin
    interclass_filter: float = 0.0
    """Above 0: other classes' cosines above it count as 0 and get no gradient, as classes that are the same person
    under two labels would. insightface's option of that name."""
    chunk: int = 0
    """Centres a tile; 0 sizes tiles by the batch and the device."""
    product_dtype: torch.dtype = torch.float32
    """Operands of the matrix products; sums are float32 whatever it is."""
    sparse_gradient: bool = True
    """Of sampled classes: a sparse gradient, of their rows alone; False: a dense one with zeros elsewhere."""

    def tile(self, rows: int, device: torch.device) -> int:
        return self.chunk or max(64, _TILE_BYTES.get(device.type, 64 << 20) // (4 * max(rows, 1)))


class _Tiles:
    """Normalised centres tile by tile, and exp(logits) of a tile with the targets' columns set as asked."""

    def __init__(
        self, x_ND: Tensor, w_CD: Tensor, rows_S: Tensor | None, target_N: Tensor, settings: SoftmaxSettings
    ) -> None:
        self.x_ND, self.w_CD, self.rows_S, self.target_N = x_ND, w_CD, rows_S, target_N
        self.settings = settings
        self.shift = shift_for(settings.scale, settings.num_classes)
        self.size = w_CD.shape[0] if rows_S is None else rows_S.shape[0]
        self.step = settings.tile(x_ND.shape[0], x_ND.device)

    def starts(self) -> range:
        return range(0, self.size, self.step)

    def centres(self, start: int) -> tuple[Tensor, Tensor]:
        """Unit centres (c, D) of the tile and the inverse lengths (c, 1) of the raw ones."""
        stop = min(start + self.step, self.size)
        raw_cD = self.w_CD[start:stop] if self.rows_S is None else self.w_CD[self.rows_S[start:stop]]
        inverse_c1 = raw_cD.norm(dim=1, keepdim=True).clamp_min(_MIN_NORM).reciprocal()
        return raw_cD * inverse_c1, inverse_c1

    def exponentials(
        self,
        w_cD: Tensor,
        start: int,
        *,
        at_target_N: Tensor | None = None,
        by_N: Tensor | None = None,
        filtered_N: Tensor | None = None,
    ) -> Tensor:
        """exp(s cos - shift) (N, c), times by_N a row if given; targets' columns hold at_target_N (0 if None).

        Cosines that the filter takes leave 0 here; filtered_N, if given, is raised by how many a row these are.
        """
        tile_Nc = product(self.x_ND, w_cD.T, self.settings.product_dtype)
        column_N = self.target_N - start
        inside_N = (column_N >= 0) & (column_N < w_cD.shape[0])
        column_N1 = column_N.clamp(0, w_cD.shape[0] - 1)[:, None]
        taken_Nc: Tensor | None = None
        if self.settings.interclass_filter:
            taken_Nc = tile_Nc > self.settings.interclass_filter
            if filtered_N is not None:
                filtered_N += taken_Nc.sum(1) - (taken_Nc.gather(1, column_N1)[:, 0] & inside_N).to(filtered_N.dtype)
        tile_Nc.mul_(self.settings.scale)
        if self.shift:
            tile_Nc.sub_(self.shift)
        tile_Nc.exp_()
        if taken_Nc is not None:
            tile_Nc.masked_fill_(taken_Nc, 0)
        if by_N is not None:
            tile_Nc.mul_(by_N[:, None])
        value_N = torch.zeros_like(self.x_ND[:, 0]) if at_target_N is None else at_target_N
        kept_N = tile_Nc.gather(1, column_N1)[:, 0]
        return tile_Nc.scatter_(1, column_N1, torch.where(inside_N, value_N, kept_N)[:, None])


class _StreamingSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_CD: Tensor,
        rows_S: Tensor | None,
        target_N: Tensor,
        margin_N: Tensor,
        settings: SoftmaxSettings,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        tiles = _Tiles(x_ND, w_CD, rows_S, target_N, settings)
        owned_N = target_N >= 0
        zero_N = torch.zeros_like(x_ND[:, 0])

        sums_2N = torch.zeros(2, x_ND.shape[0], dtype=x_ND.dtype, device=x_ND.device)
        other_N, logit_N = sums_2N  # sum over the other classes; the target's logit
        want_x = ctx.needs_input_grad[0]
        u_ND = torch.zeros_like(x_ND) if want_x else None
        filtered_N = zero_N.clone()
        for start in tiles.starts():
            w_cD, _ = tiles.centres(start)
            e_Nc = tiles.exponentials(w_cD, start, filtered_N=filtered_N)
            other_N += e_Nc.sum(1)
            if u_ND is not None:
                u_ND += product(e_Nc, w_cD, settings.product_dtype)

        if settings.interclass_filter:
            other_N += filtered_N * math.exp(-tiles.shift)
        target_ND = zero_N[:, None].expand_as(x_ND)
        slope_N = zero_N
        if tiles.size:
            raw_ND = w_CD[target_N.clamp_min(0) if rows_S is None else rows_S[target_N.clamp_min(0)]]
            target_ND = raw_ND / raw_ND.norm(dim=1, keepdim=True).clamp_min(_MIN_NORM)
            psi_N, slope_N = settings.margin((x_ND * target_ND).sum(1), margin_N.to(x_ND.dtype))
            logit_N += torch.where(owned_N, settings.scale * psi_N, zero_N)
            slope_N = torch.where(owned_N, settings.scale * slope_N, zero_N)

        all_reduce_(sums_2N, group)
        odds_N = other_N.log() + tiles.shift - logit_N  # log of (other classes : target)
        miss_N = odds_N.sigmoid()  # probability that is not the target's
        # Below the floor the quotient would leave float32 and turn 0 x inf into nan; the gradient there is too small.
        floor = 2 * settings.scale / torch.finfo(x_ND.dtype).max
        over_sum_N = torch.where(other_N > 0, settings.scale * miss_N / other_N.clamp_min(floor), zero_N)
        ctx.settings = settings
        # By row: d loss / d x = over_sum * U - miss * slope * w_y, kept whole for backward.
        dx_ND = None
        if u_ND is not None:
            dx_ND = u_ND.mul_(over_sum_N[:, None]).sub_((miss_N * slope_N)[:, None] * target_ND)
        ctx.save_for_backward(x_ND, w_CD, rows_S, target_N, over_sum_N, -miss_N * slope_N, dx_ND)
        return torch.nn.functional.softplus(odds_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_CD, rows_S, target_N, over_sum_N, at_target_N, dx_ND = ctx.saved_tensors
        grad_x_ND = None if dx_ND is None else dx_ND * grad_N[:, None]
        grad_w: Tensor | None = None
        if ctx.needs_input_grad[1]:
            tiles = _Tiles(x_ND, w_CD, rows_S, target_N, ctx.settings)
            grad_SD = w_CD.new_empty(tiles.size, w_CD.shape[1])
            for start in tiles.starts():
                w_cD, inverse_c1 = tiles.centres(start)
                g_Nc = tiles.exponentials(w_cD, start, at_target_N=at_target_N * grad_N, by_N=over_sum_N * grad_N)
                d_cD = product(g_Nc.T, x_ND, ctx.settings.product_dtype)
                # Through w / |w|: the part along w has no effect, the rest shrinks with |w|.
                d_cD.sub_((d_cD * w_cD).sum(1, keepdim=True) * w_cD).mul_(inverse_c1)
                grad_SD[start : start + w_cD.shape[0]] = d_cD
            grad_w = grad_SD
            if rows_S is not None and not ctx.settings.sparse_gradient:
                grad_w = torch.zeros_like(w_CD).index_copy_(0, rows_S, grad_SD)
            elif rows_S is not None:
                grad_w = torch.sparse_coo_tensor(
                    rows_S[None], grad_SD, w_CD.shape, is_coalesced=True, check_invariants=False
                )
        return grad_x_ND, grad_w, None, None, None, None, None


def streaming_margin_softmax(
    x_ND: Tensor,
    w_CD: Tensor,
    target_N: Tensor,
    margin_N: Tensor,
    settings: SoftmaxSettings,
    group: dist.ProcessGroup | None,
    rows_S: Tensor | None = None,
) -> Tensor:
    """Loss of every row of the global batch, -log softmax of its target over the classes of all shards.

    x_ND: float32 (or float64) unit embeddings, the same on all ranks. w_CD: this rank's raw centres.
    target_N: int64, the target's row in this shard (its position in rows_S when sampled), or -1 when another
    rank owns it. margin_N: the target's margin, read where target_N >= 0. rows_S: sorted distinct rows that
    take part, or None for all; the gradient of w_CD then has just these rows.

    Returns (N,), the same on all ranks. A row whose target no rank owns has a meaningless loss: leave it out
    of the mean, and it leaves no gradient. Backward gives x_ND this shard's share of the gradient (sum over
    ranks to get all of it) and w_CD the whole. Forward runs one all-reduce of 2N floats, backward none.
    """
    loss_N: Tensor = _StreamingSoftmax.apply(  # type: ignore[no-untyped-call]
        x_ND, w_CD, rows_S, target_N, margin_N, settings, group
    )
    return loss_N
