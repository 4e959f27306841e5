"""Margins: what becomes of the target's cosine, and its exact derivative.

A margin is a pure function `(cosine_N, margin_N) -> (psi_N, dpsi_N)`: the target's logit is scale * psi, and
dpsi is d psi / d cosine, so that the streaming softmax needs no autograd graph through it. All other classes
keep their plain cosine.

Legend: N rows; cosine in [-1, 1]; margins one a row (radians for ArcFace, cosine units for CosFace).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    samples keep a gradient. (Others subtract m sin(m) there, which jumps, or let the logit rise: insightface.)
    """
    cosine_N = cosine_N.clamp(-1, 1)
    cos_m_N = margin_N.cos()
    psi_N, dpsi_N = _arcface_inside(cosine_N, margin_N)
    inside_N = cosine_N > -cos_m_N
    psi_N = torch.where(inside_N, psi_N, cosine_N + cos_m_N - 1)
    dpsi_N = torch.where(inside_N, dpsi_N, torch.ones_like(cosine_N))
    # m = 0 must be the plain softmax bit for bit, also where the floor acts.
    no_margin_N = margin_N == 0
    return torch.where(no_margin_N, cosine_N, psi_N), torch.where(no_margin_N, torch.ones_like(psi_N), dpsi_N)


def _arcface_inside(cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """cos(theta + m) and its slope, by the addition theorem."""
    cos_m_N, sin_m_N = margin_N.cos(), margin_N.sin()
    sin_N = (1 - cosine_N * cosine_N).clamp_min(_MIN_SIN_SQUARED).sqrt()
    return cosine_N * cos_m_N - sin_N * sin_m_N, cos_m_N + sin_m_N * cosine_N / sin_N


def cosface(cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """psi = cos(theta) - m (CosFace, arXiv 1801.09414)."""
    cosine_N = cosine_N.clamp(-1, 1)
    return cosine_N - margin_N, torch.ones_like(cosine_N)


@dataclass(frozen=True, slots=True)
class Combined:
    """psi = cos(m1 theta + m2) - m3 while m1 theta + m2 <= pi, then its continuation with a slope of 1 in the cosine.

    The three margins together are section 2.4 of ArcFace (arXiv 1801.07698): m1 multiplies the angle (SphereFace), m2
    is added to it (ArcFace), m3 taken from the cosine (CosFace). The margin of a row is m2. m1 >= 1.
    """

    m1: float = 1.0
    m3: float = 0.0

    def __call__(self, cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
        cosine_N = cosine_N.clamp(-1, 1)
        sin_N = ((1 - cosine_N) * (1 + cosine_N)).clamp_min(_MIN_SIN_SQUARED).sqrt()
        turned_N = self.m1 * torch.atan2(sin_N, cosine_N) + margin_N  # arccos would lose the small angles
        beyond_N = cosine_N - ((math.pi - margin_N) / self.m1).cos() - 1 - self.m3
        inside_N = turned_N < math.pi
        psi_N = torch.where(inside_N, turned_N.cos() - self.m3, beyond_N)
        slope_N = torch.where(inside_N, self.m1 * turned_N.sin() / sin_N, torch.ones_like(cosine_N))
        return psi_N, slope_N


def arcface_straight_through(cosine_N: Tensor, margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """psi = cos(theta + m) for every angle, with the slope of the plain cosine.

    What insightface trains with: its margin is applied without gradient, so that sin(theta + m) / sin(theta) is
    missing, and beyond theta = pi - m its logit rises again. For going on with what was trained so.
    """
    psi_N, _ = _arcface_inside(cosine_N.clamp(-1, 1), margin_N)
    return psi_N, torch.ones_like(psi_N)


def target_margin(loss: str, *, m1: float = 1.0, m3: float = 0.0, straight_through: bool = False) -> TargetMargin:
    """The margin that `head.loss` names. m1, m3: of "combined" only. straight_through: of "arcface" only.

    CosFace's slope is 1 either way. Raises ValueError for another name, or a setting that the loss does not have.
    """
    if straight_through and loss == "combined":
        raise ValueError("straight_through: there is none for the combined margin; use arcface or cosface")
    if loss == "combined":
        return Combined(m1, m3)
    if (m1, m3) != (1.0, 0.0):
        raise ValueError(f"m1, m3: expected 1 and 0 with the loss {loss}, got {m1} and {m3}: use combined")
    try:
        return {"arcface": arcface_straight_through if straight_through else arcface, "cosface": cosface}[loss]
    except KeyError:
        raise ValueError(f"loss: expected arcface, cosface or combined, got {loss!r}") from None
