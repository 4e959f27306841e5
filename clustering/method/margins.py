"""Margins of classes from their hard levels. Ours, see docs/method.md.

Legend: C classes, all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.method.hardness import weighted_mean

_SIGMA_FLOOR = 0.05  # hard levels closer together than this do not count as a spread
_HALVINGS = 60  # from an interval below 4 to one below float64's resolution of a margin


def class_margins(
    hard_C: Tensor,
    weight_C: Tensor,
    *,
    suspects: float | Tensor,
    margin: float,
    low: float,
    high: float,
    delta: float,
    direction: int,
) -> Tensor:
    """Full-strength margin of each class, float64 (C,).

    t = direction x delta x tanh((h - mean) / max(sigma, 0.05)) and m = clip(margin + t + b, low, high), with b,
    found by bisection, such that the mean margin of all rows that training sees is `margin`: weight_C samples of each
    class at its own, and `suspects` more at the smallest of all classes. Classes get different margins, the training
    as a whole does not get a larger one. mean and sigma are over classes, weighted by weight_C. Equal hard levels, or
    delta = 0, give `margin` for all (exactly, once rounded to float32).

    hard_C: float64. weight_C: float64, samples a class counts for. low <= margin <= high. No collective: the numbers
    of all classes are there, and every rank computes the same.
    """
    mean = weighted_mean(hard_C, weight_C)
    sigma = weighted_mean((hard_C - mean).square(), weight_C).sqrt()
    t_C = direction * delta * torch.tanh((hard_C - mean) / sigma.clamp_min(_SIGMA_FLOOR))
    below = torch.full_like(mean, low - margin - delta)  # here every margin is clipped to `low`
    above = torch.full_like(mean, high - margin + delta)
    for _ in range(_HALVINGS):
        b = (below + above) / 2
        too_small = mean_margin((margin + t_C + b).clamp(low, high), weight_C, suspects) < margin
        below, above = torch.where(too_small, b, below), torch.where(too_small, above, b)
    full_C = (margin + t_C + (below + above) / 2).clamp(low, high)
    return torch.where(weight_C.sum() > 0, full_C, margin)


def mean_margin(margin_C: Tensor, weight_C: Tensor, suspects: float | Tensor) -> Tensor:
    """Mean over rows, a float64 scalar: weight_C of each class at its margin, `suspects` rows at the smallest one.

    0 when there is no row.
    """
    if not len(margin_C):
        return margin_C.new_zeros(())
    rows = torch.cat([margin_C, margin_C.min()[None]])
    return weighted_mean(rows, torch.cat([weight_C, weight_C.new_zeros(1) + suspects]))


def smallest_margin(margin_C: Tensor, margin: float) -> Tensor:
    """The smallest margin of all classes, at most `margin`: a float64 scalar, which suspects get."""
    return torch.cat([margin_C, margin_C.new_tensor([margin])]).min()


def ramped(full: Tensor, margin: float, ramp: float) -> Tensor:
    """margin + ramp (full - margin), float32: the weighted mean stays `margin` and the bounds hold at every ramp."""
    return (margin + ramp * (full - margin)).float()
