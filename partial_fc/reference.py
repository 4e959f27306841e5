"""The dense head: one rank, one (B, C) matrix, plain autograd. Slow, and the specification of the fast one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
    logits_BC = scale * cosine_BC.scatter(1, target_B1, psi_B[:, None])
    losses_B = logits_BC.logsumexp(1) - scale * psi_B
    return (losses_B * valid_B).sum() / valid_B.sum().clamp_min(1)
