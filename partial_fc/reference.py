"""The dense head: whole (B, C) matrices, plain autograd. Slow, and the specification of the fast one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partial_fc.collectives import SumOverRanks
from partial_fc.margins import TargetMargin
from partial_fc.negatives import Negatives
from partial_fc.tiles import SampledRows, SoftmaxSettings, shift_for


def arcface_logit(cosine_B: Tensor, margin_B: Tensor) -> Tensor:
    """cos(theta + m) by way of the angle itself, continued as cos(theta) + cos(m) - 1 beyond theta = pi - m."""
    limit = 1 - torch.finfo(cosine_B.dtype).eps  # arccos has no finite slope at +-1
    theta_B = cosine_B.clamp(-limit, limit).arccos()
    beyond_B = cosine_B + margin_B.cos() - 1
    return torch.where(theta_B + margin_B < torch.pi, (theta_B + margin_B).cos(), beyond_B)


def cosface_logit(cosine_B: Tensor, margin_B: Tensor) -> Tensor:
    """cos(theta) - m."""
    return cosine_B - margin_B


def combined_logit(cosine_B: Tensor, margin_B: Tensor, m1: float = 1.0, m3: float = 0.0) -> Tensor:
    """cos(m1 theta + m2) - m3, continued beyond pi along a straight line in the cosine."""
    limit = 1 - torch.finfo(cosine_B.dtype).eps
    turned_B = m1 * cosine_B.clamp(-limit, limit).arccos() + margin_B
    beyond_B = cosine_B - ((torch.pi - margin_B) / m1).cos() - 1
    return torch.where(turned_B < torch.pi, turned_B.cos(), beyond_B) - m3


def straight_through_logit(cosine_B: Tensor, margin_B: Tensor) -> Tensor:
    """cos(theta + m) with the gradient of cos(theta)."""
    limit = 1 - torch.finfo(cosine_B.dtype).eps
    psi_B = (cosine_B.clamp(-limit, limit).arccos() + margin_B).cos()
    return cosine_B + (psi_B - cosine_B).detach()


TargetLogit = Callable[[Tensor, Tensor], Tensor]


def dense_margin_softmax(
    x_BD: Tensor,
    w_CD: Tensor,
    labels_B: Tensor,
    margins_C: Tensor,
    *,
    scale: float,
    target_logit: TargetLogit = arcface_logit,
    interclass_filter: float = 0.0,
) -> Tensor:
    """Mean over rows with a label >= 0 of -log softmax_y(scale * logits); logits are cosines, but for the
    target's, which carries the margin of its class.

    x_BD, w_CD: rows of any length, normalised here. labels_B: int64, -1 rows are ignored. margins_C: one a class.
    interclass_filter: above 0, other classes' cosines above it become 0 and get no gradient.
    Returns a scalar of x's dtype, 0 when no row is valid. No collective.
    """
    cosine_BC = F.normalize(x_BD) @ F.normalize(w_CD).T
    valid_B = labels_B >= 0
    target_B1 = labels_B.clamp_min(0)[:, None]
    psi_B = target_logit(cosine_BC.gather(1, target_B1)[:, 0], margins_C[target_B1[:, 0]])
    if interclass_filter:
        cosine_BC = torch.where(cosine_BC > interclass_filter, 0, cosine_BC)
    logits_BC = scale * cosine_BC.scatter(1, target_B1, psi_B[:, None].to(cosine_BC.dtype))  # autocast's are bf16
    losses_B = logits_BC.logsumexp(1) - scale * psi_B
    return (losses_B * valid_B).sum() / valid_B.sum().clamp_min(1)


def _with_slope(value: Tensor, *slopes: tuple[Tensor, Tensor]) -> Tensor:
    """The value, with the slopes said in the variables named."""
    return value.detach() + sum(slope.detach() * (variable - variable.detach()) for slope, variable in slopes)


def sharded_margin_softmax(
    x_ND: Tensor,
    w_RD: Tensor,
    target_N: Tensor,
    margin_N: Tensor,
    settings: SoftmaxSettings,
    group: dist.ProcessGroup | None,
    margin: TargetMargin,
    sampled: SampledRows | None,
    negatives: Negatives | None,
) -> Tensor:
    """What `streaming_margin_softmax` computes, with one (N, C) matrix a rank and autograd. One all-reduce.

    The centres' gradient is dense, zeros for classes that are not sampled: their optimizer then moves those too.
    """
    K = settings.subcentres
    w_CKD = F.normalize(w_RD.to(x_ND.dtype), eps=1e-12).unflatten(0, (-1, K))
    cosine_NC = torch.einsum("nd,ckd->nck", x_ND, w_CKD).amax(2) if len(w_RD) else x_ND.new_zeros(len(x_ND), 0)
    owned_N = target_N >= 0
    other_NC = torch.ones_like(cosine_NC, dtype=torch.bool)
    logit_N = torch.zeros_like(x_ND[:, 0])
    if len(w_RD):
        target_N1 = target_N.clamp_min(0)[:, None]
        other_NC = other_NC.scatter(1, target_N1, ~owned_N[:, None])
        cosine_N = cosine_NC.gather(1, target_N1)[:, 0]
        target = margin(cosine_N, margin_N)
        psi_N = _with_slope(target.psi_N, (target.by_cosine_N, cosine_N), (target.by_margin_N, margin_N))
        logit_N = torch.where(owned_N, settings.scale * psi_N, 0)
    if sampled is not None:
        takes_part_C = torch.zeros(cosine_NC.shape[1] + 1, dtype=torch.bool, device=x_ND.device)
        takes_part_C[sampled.rows_S] = True  # padding is one beyond the last class
        other_NC = other_NC & takes_part_C[:-1]
    value_NC, bound = cosine_NC, 1.0
    if negatives is not None:
        value_CN, slope_CN = negatives(cosine_NC.T)
        value_NC, bound = _with_slope(value_CN.T, (slope_CN.T, cosine_NC)), negatives.bound
    shift = shift_for(settings.scale * bound, settings.num_classes)
    sum_N = torch.where(other_NC, (settings.scale * value_NC - shift).exp(), 0).sum(1)
    sum_N = sum_N + x_ND[:0].sum() + w_RD[:0].sum()  # a rank without classes has a graph too
    sums_2N: Tensor = SumOverRanks.apply(torch.stack([sum_N, logit_N]), group)  # type: ignore[no-untyped-call]
    return F.softplus(sums_2N[0].log() + shift - sums_2N[1])
