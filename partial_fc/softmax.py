"""Streaming margin softmax over a shard of class centres: no (N, C) tensor is ever kept.

What makes it stream, and exact:

- Logits of the other classes are bounded, so exp() needs no running maximum: one constant shift keeps every sum
  inside float32's range (`shift_for`). No max pass, no max all-reduce.
- The margin touches only the target's logit. It is computed beside the tiles (N dot products); inside a tile
  the target's column is simply left out. The loss is softplus(log S + shift - t), with S the sum over the
  *other* classes and t the target's logit: nothing cancels, so well-learned samples keep their precision.
- With a constant shift the unnormalised embedding gradient U = sum_c exp(logit_c) w_c is a by-product of the
  forward pass; dividing by the global S later makes it the gradient.
- The centres' gradient is made tile by tile, in backward or, better, by the optimizer itself (`partial_fc.deferred`).
  A bounded number of cosines is kept for it; beyond that they are made again.

Three to four matrix products a step in all, one all-reduce of two float64 a row. Centres are normalised tile by tile;
the gradient is that of the raw rows (tangent to the sphere, over the row's length).

Legend: N rows of the global batch, D embedding size, C classes of this shard (S of them when sampled), K sub-centres a
class, R = C K rows of the weight; further `partial_fc.tiles`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc import kernels
from partial_fc.choice import runs_kernels
from partial_fc.collectives import all_reduce_, refuse_second_derivative
from partial_fc.deferred import CentreGradient, Defer, Kept, deferred
from partial_fc.margins import Target, TargetMargin
from partial_fc.negatives import Negatives
from partial_fc.products import add_product_
from partial_fc.reference import sharded_margin_softmax
from partial_fc.tiles import MIN_NORM, SampledRows, SoftmaxSettings, TileMath, position_of, tiles_of

__all__ = ["SoftmaxSettings", "streaming_margin_softmax", "target_cosines"]


def target_cosines(x_ND: Tensor, w_RD: Tensor, target_N: Tensor, subcentres: int = 1) -> tuple[Tensor, Tensor]:
    """(cosine_N, unit_ND): each row's cosine with its class, and the unit centre that gave it.

    target_N: int64 class of this shard; where it is -1 the values mean nothing.
    """
    if not len(w_RD):
        return x_ND.new_zeros(len(x_ND)), torch.zeros_like(x_ND)
    raw_NKD = w_RD.unflatten(0, (-1, subcentres))[target_N.clamp_min(0)].to(x_ND.dtype)
    unit_NKD = raw_NKD / raw_NKD.norm(dim=2, keepdim=True).clamp_min(MIN_NORM)
    cosine_N, best_N = (x_ND[:, None] * unit_NKD).sum(2).max(1)
    return cosine_N, unit_NKD[torch.arange(len(x_ND), device=x_ND.device), best_N]


class _StreamingSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_RD: Tensor,
        margin_N: Tensor,
        target_N: Tensor,
        sampled: SampledRows | None,
        settings: SoftmaxSettings,
        margin: TargetMargin,
        negatives: Negatives | None,
        group: dist.ProcessGroup | None,
        room: int,
        ready: list[CentreGradient] | None,
    ) -> Tensor:
        """room: bytes of cosines to keep. ready: where the centres' gradient goes; None: backward returns it."""
        size = w_RD.shape[0] // settings.subcentres
        math = TileMath(x_ND.detach(), position_of(target_N, sampled), size, settings, negatives)
        by_kernels = runs_kernels(settings.impl, x_ND, w_RD, subcentres=settings.subcentres, negatives=negatives)
        # By row everything is float64: it is N numbers, and the loss and the gradient are exp() of their difference.
        sums_2N = torch.zeros(2, x_ND.shape[0], dtype=torch.float64, device=x_ND.device)
        other_N, logit_N = sums_2N  # sum over the other classes; the target's logit
        kept: Kept = {}
        if by_kernels:
            terms = math.for_kernels(w_RD, target_N, None if sampled is None else sampled.rows_S)
            sum_N, u_ND = kernels.forward(terms, want_u=ctx.needs_input_grad[0])
            other_N += sum_N
        else:
            u_ND = _walk(math, w_RD, sampled, other_N, kept, room=room, want_u=ctx.needs_input_grad[0])

        owned_N = target_N >= 0
        cosine_N, unit_ND = target_cosines(x_ND.double(), w_RD, target_N, settings.subcentres)
        target = Target(*(torch.where(owned_N, settings.scale * t, 0) for t in margin(cosine_N, margin_N.double())))
        logit_N += target.psi_N
        all_reduce_(sums_2N, group)
        odds_N = other_N.log() + math.shift - logit_N  # log of (other classes : target)
        miss_N = odds_N.sigmoid()  # probability that is not the target's
        # Below the floor the quotient would leave float32 and turn 0 x inf into nan; the gradient there is too small.
        floor = 2 * settings.scale / torch.finfo(x_ND.dtype).max
        by_N = torch.where(other_N > 0, settings.scale * miss_N / other_N.clamp_min(floor), 0).to(x_ND.dtype)
        at_target_N = (-miss_N * target.by_cosine_N).to(x_ND.dtype)
        dm_N = (-miss_N * target.by_margin_N).to(x_ND.dtype)
        # By row: d loss / d x = by * U - miss * slope * w_y, kept whole for backward.
        dx_ND = None
        if u_ND is not None:
            dx_ND = u_ND.mul_(by_N[:, None]).add_(at_target_N[:, None] * unit_ND.to(x_ND.dtype))
        ctx.math, ctx.sampled, ctx.kept, ctx.ready, ctx.version = math, sampled, kept, ready, w_RD._version
        ctx.by_kernels = by_kernels
        ctx.save_for_backward(w_RD, target_N, by_N, at_target_N, dx_ND, dm_N)
        return torch.nn.functional.softplus(odds_N).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        w_RD, target_N, by_N, at_target_N, dx_ND, dm_N = ctx.saved_tensors
        grad_x_ND = None if dx_ND is None else dx_ND * grad_N[:, None]
        grad_m_N = dm_N * grad_N if ctx.needs_input_grad[2] else None
        grad_w: Tensor | None = None
        if ctx.needs_input_grad[1]:
            gradient = CentreGradient(
                ctx.math,
                ctx.sampled,
                target_N,
                by_N * grad_N,
                at_target_N * grad_N,
                ctx.kept,
                ctx.version,
                ctx.by_kernels,
            )
            if ctx.ready is None:
                grad_w = _materialise(gradient, w_RD)
            else:
                ctx.ready[:] = [gradient]
                grad_w = w_RD.new_zeros(()).expand_as(w_RD)  # only to make `Defer` run
        return grad_x_ND, grad_w, grad_m_N, *[None] * 8


def _walk(
    math: TileMath,
    w_RD: Tensor,
    sampled: SampledRows | None,
    other_N: Tensor,
    kept: Kept,
    *,
    room: int,
    want_u: bool,
) -> Tensor | None:
    """Add to other_N the sum of exp(logit) over the other classes; returns U (N, D), if wanted. Cosines of the first
    tiles go to `kept`, as far as `room`, in bytes, reaches."""
    x_ND, settings = math.x_ND, math.settings
    u_ND = torch.zeros_like(x_ND) if want_u else None
    for tile in tiles_of(math.size, settings.tile(x_ND), sampled):
        raw_kD = tile.take(w_RD, settings.subcentres).to(x_ND.dtype)
        cosine_kN, inverse_k = math.cosines(raw_kD)
        room -= cosine_kN.nbytes
        if room >= 0:
            kept[tile.start, tile.stop] = cosine_kN, inverse_k
        e_cN, slope_cN, best_cN = math.exponentials(tile, cosine_kN)
        other_N += e_cN.sum(0)
        if u_ND is not None:
            if slope_cN is not None:
                e_cN.mul_(slope_cN)
            e_kN = math.by_row(e_cN, best_cN).mul_(inverse_k[:, None])
            add_product_(u_ND, e_kN.T, raw_kD, settings.product_dtype)
    return u_ND


def _materialise(gradient: CentreGradient, w_RD: Tensor) -> Tensor:
    """The gradient as autograd wants it: dense, or of sampled classes' rows alone. One host sync for the latter."""
    math, sampled = gradient.math, gradient.sampled
    settings = math.settings
    K, D = settings.subcentres, w_RD.shape[1]
    if gradient.by_kernels:
        rows_S = None if sampled is None else sampled.rows_S
        grad_SD = kernels.gradient([gradient.for_kernels(w_RD)], rows_S)
    else:
        size = math.size if sampled is None else len(sampled.rows_S)
        grad_SD = math.x_ND.new_empty(size * K, D)
        for tile in tiles_of(math.size, settings.tile(math.x_ND), sampled):
            raw_kD = tile.take(w_RD, K).to(math.x_ND.dtype)
            out_kD = grad_SD[tile.start * K : tile.stop * K]
            radial_k = gradient.add_(out_kD, tile, raw_kD, 0.0)
            out_kD.addcmul_(raw_kD, radial_k[:, None], value=-1)
    grad_SD = grad_SD.to(w_RD.dtype)
    if sampled is None:
        return grad_SD
    classes_S = sampled.trimmed(math.size)
    rows_S = (classes_S[:, None] * K + torch.arange(K, device=classes_S.device)).flatten()
    grad_SD = grad_SD[: len(rows_S)]
    if settings.sparse_gradient:
        with torch.sparse.check_sparse_tensor_invariants(False):  # the argument alone leaves a warning
            return torch.sparse_coo_tensor(rows_S[None], grad_SD, w_RD.shape, is_coalesced=True)
    return torch.zeros_like(w_RD).index_copy_(0, rows_S, grad_SD)


def streaming_margin_softmax(
    x_ND: Tensor,
    w_RD: Tensor,
    target_N: Tensor,
    margin_N: Tensor,
    settings: SoftmaxSettings,
    group: dist.ProcessGroup | None,
    *,
    margin: TargetMargin,
    sampled: SampledRows | None = None,
    negatives: Negatives | None = None,
) -> Tensor:
    """Loss of every row of the global batch, -log softmax of its target over the classes of all shards.

    x_ND: float32 (or float64) unit embeddings, the same on all ranks. w_RD: this rank's raw centres, float32 or bf16.
    target_N: int64, the target's class in this shard, or -1 when another rank owns it. margin_N: the target's margin,
    read where target_N >= 0, differentiable. sampled: the classes that take part, all targets among them, or None for
    all. margin: what it does to the target's cosine. negatives: what becomes of the others', None for nothing.

    Returns (N,), the same on all ranks. A row whose target no rank owns has a meaningless loss: leave it out
    of the mean, and it leaves no gradient. Backward gives x_ND and margin_N this shard's share of the gradient (sum
    over ranks to get all of it) and w_RD the whole: to its optimizer where that takes it (`partial_fc.deferred`), else
    as .grad. Forward runs one all-reduce of 2N float64, backward none.
    """
    if settings.impl == "reference":
        with torch.autocast(x_ND.device.type, enabled=False):
            return sharded_margin_softmax(x_ND, w_RD, target_N, margin_N, settings, group, margin, sampled, negatives)
    room = 0
    ready: list[CentreGradient] | None = None
    if torch.is_grad_enabled() and w_RD.requires_grad:
        waiting, room = deferred(w_RD), settings.kept_bytes
        if waiting is not None:
            room, ready = waiting.room(room, sampled=sampled is not None), []
            w_RD = Defer.apply(w_RD, ready, waiting)  # type: ignore[no-untyped-call]
    loss_N: Tensor = _StreamingSoftmax.apply(  # type: ignore[no-untyped-call]
        x_ND, w_RD, margin_N, target_N, sampled, settings, margin, negatives, group, room, ready
    )
    return loss_N
