"""Margins of classes from their hard levels. Ours, see docs/method.md.

Legend: R classes of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.hardness import weighted_mean
from partial_fc.collectives import all_reduce_

_SIGMA_FLOOR = 0.05  # hard levels closer together than this do not count as a spread
_HALVINGS = 60  # from an interval below 4 to one below float64's resolution of a margin


def class_margins(
    hard_R: Tensor,
    weight_R: Tensor,
    *,
    margin: float,
    low: float,
    high: float,
    delta: float,
    direction: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Full-strength margin of each class, float64 (R,).

    t = direction x delta x tanh((h - mean) / max(sigma, 0.05)) and m = clip(margin + t + b, low, high), with b,
    found by bisection, such that the mean of m over all ranks, weighted by weight_R, is `margin`: classes get
    different margins, the training as a whole does not get a larger one. mean and sigma are weighted alike.
    Equal hard levels, or delta = 0, give `margin` for all (exactly, once rounded to float32).

    hard_R: float64. weight_R: float64, samples a class counts for. low <= margin <= high. Collectives: 63
    all-reduces of two floats, once a refresh.
    """
    mean = weighted_mean(hard_R, weight_R, group)
    sigma = weighted_mean((hard_R - mean).square(), weight_R, group).sqrt()
    t_R = direction * delta * torch.tanh((hard_R - mean) / sigma.clamp_min(_SIGMA_FLOOR))
    below = torch.full_like(mean, low - margin - delta)  # here every margin is clipped to `low`
    above = torch.full_like(mean, high - margin + delta)
    for _ in range(_HALVINGS):
        b = (below + above) / 2
        too_small = weighted_mean((margin + t_R + b).clamp(low, high), weight_R, group) < margin
        below, above = torch.where(too_small, b, below), torch.where(too_small, above, b)
    full_R = (margin + t_R + (below + above) / 2).clamp(low, high)
    anything = weighted_mean(torch.ones_like(hard_R), weight_R, group) > 0
    return torch.where(anything, full_R, margin)


def smallest_margin(margin_R: Tensor, margin: float, group: dist.ProcessGroup) -> Tensor:
    """The smallest margin of all ranks' classes, at most `margin`: a float64 scalar. One all-reduce."""
    own = torch.cat([margin_R, margin_R.new_tensor([margin])]).min()
    return all_reduce_(own, group, dist.ReduceOp.MIN)


def ramped(full: Tensor, margin: float, ramp: float) -> Tensor:
    """margin + ramp (full - margin), float32: the weighted mean stays `margin` and the bounds hold at every ramp."""
    return (margin + ramp * (full - margin)).float()
