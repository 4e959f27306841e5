"""Margins: what becomes of the target's cosine, and its exact derivative.

A margin is a pure function `(cosine_N, margin_N) -> (psi_N, dpsi_N)`: the target's logit is scale * psi, and
dpsi is d psi / d cosine, so that the streaming softmax needs no autograd graph through it. All other classes
keep their plain cosine.

Legend: N rows; cosine in [-1, 1]; margins one a row (radians for ArcFace, cosine units for CosFace).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TargetMargin = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_MIN_SIN_SQUARED = 1e-10
"""Floor of sin^2(theta). d psi / d cos grows as 1 / sin(theta), while the gradient it multiplies, tangent to the
sphere, shrinks as sin(theta): the floor only acts within 1e-5 rad of the centre, where float32 cosines carry no
more information."""


def arcface(cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """psi = cos(theta + m) while theta + m <= pi, then its continuation along a straight line.

    ArcFace (arXiv 1801.07698) adds m to the target's angle. Beyond theta = pi - m, cos(theta + m) would rise
    again and reward a sample for leaving its class. Ours goes on as cos(theta) + cos(m) - 1: continuous in
    value there (-1), still strictly falling in theta, and with a slope of 1 in the cosine, so that the worst
    samples keep a gradient. (insightface subtracts m sin(m) instead, which jumps.)
    """
    cosine_N = cosine_N.clamp(-1, 1)
    cos_m_N, sin_m_N = margin_N.cos(), margin_N.sin()
    sin_N = (1 - cosine_N * cosine_N).clamp_min(_MIN_SIN_SQUARED).sqrt()
    inside_N = cosine_N > -cos_m_N
    psi_N = torch.where(inside_N, cosine_N * cos_m_N - sin_N * sin_m_N, cosine_N + cos_m_N - 1)
    dpsi_N = torch.where(inside_N, cos_m_N + sin_m_N * cosine_N / sin_N, torch.ones_like(cosine_N))
    # m = 0 must be the plain softmax bit for bit, also where the floor acts.
    no_margin_N = margin_N == 0
    return torch.where(no_margin_N, cosine_N, psi_N), torch.where(no_margin_N, torch.ones_like(psi_N), dpsi_N)


def cosface(cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """psi = cos(theta) - m (CosFace, arXiv 1801.09414)."""
    cosine_N = cosine_N.clamp(-1, 1)
    return cosine_N - margin_N, torch.ones_like(cosine_N)


MARGINS: dict[str, TargetMargin] = {"arcface": arcface, "cosface": cosface}
"""Margins by the name that `head.loss` takes."""
