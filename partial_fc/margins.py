"""Margins: what becomes of the target's cosine, and its exact derivatives.

A margin is a pure function `(cosine_N, margin_N) -> Target`: the target's logit is scale * psi; the slopes in the
cosine and in the margin come along, so that the streaming softmax needs no autograd graph through it. Margins that
depend on the sample (`partial_fc.adaptive`) are built from these.

Legend: N rows; cosine in [-1, 1]; margins one a row (radians for ArcFace, cosine units for CosFace).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MIN_SIN_SQUARED = 1e-10
"""Floor of sin^2(theta). d psi / d cos grows as 1 / sin(theta), while the gradient it multiplies, tangent to the
sphere, shrinks as sin(theta): the floor only acts within 1e-5 rad of the centre, where float32 cosines carry no
more information."""


class Target(NamedTuple):
    """The target's logit over the scale, and its slopes. Each (N,)."""

    psi_N: Tensor
    by_cosine_N: Tensor
    """d psi / d cosine"""
    by_margin_N: Tensor
    """d psi / d margin"""


TargetMargin = Callable[[Tensor, Tensor], Target]


def arcface(cosine_N: Tensor, margin_N: Tensor) -> Target:
    """psi = cos(theta + m) while 0 <= theta + m <= pi, then its continuation along a straight line.

    ArcFace (arXiv 1801.07698) adds m to the target's angle. Beyond theta = pi - m, cos(theta + m) would rise
    again and reward a sample for leaving its class. Ours goes on as cos(theta) + cos(m) - 1: continuous in
    value there (-1), still strictly falling in theta, and with a slope of 1 in the cosine, so that the worst
    samples keep a gradient. (Others subtract m sin(m) there, which jumps, or let the logit rise: insightface.)
    A negative margin (AdaFace has them) is treated alike at its own end: below theta = -m the logit would fall as the
    sample comes nearer; ours goes on as cos(theta) - cos(m) + 1.
    """
    cosine_N = cosine_N.clamp(-1, 1)
    cos_m_N, sin_m_N = margin_N.cos(), margin_N.sin()
    inside = _arcface_inside(cosine_N, margin_N)
    rises_N = margin_N >= 0
    inside_N = torch.where(rises_N, cosine_N > -cos_m_N, cosine_N < cos_m_N)
    side_N = torch.where(rises_N, 1.0, -1.0).to(cosine_N.dtype)
    one_N = torch.ones_like(cosine_N)
    psi_N = torch.where(inside_N, inside.psi_N, cosine_N + side_N * (cos_m_N - 1))
    by_cosine_N = torch.where(inside_N, inside.by_cosine_N, one_N)
    by_margin_N = torch.where(inside_N, inside.by_margin_N, -side_N * sin_m_N)
    # m = 0 must be the plain softmax bit for bit, also where the floor acts.
    none_N = margin_N == 0
    return Target(torch.where(none_N, cosine_N, psi_N), torch.where(none_N, one_N, by_cosine_N), by_margin_N)


def _arcface_inside(cosine_N: Tensor, margin_N: Tensor) -> Target:
    """cos(theta + m) and its slopes, by the addition theorem."""
    cos_m_N, sin_m_N = margin_N.cos(), margin_N.sin()
    sin_N = (1 - cosine_N * cosine_N).clamp_min(_MIN_SIN_SQUARED).sqrt()
    return Target(
        cosine_N * cos_m_N - sin_N * sin_m_N,
        cos_m_N + sin_m_N * cosine_N / sin_N,
        -(cosine_N * sin_m_N + sin_N * cos_m_N),
    )


def cosface(cosine_N: Tensor, margin_N: Tensor) -> Target:
    """psi = cos(theta) - m (CosFace, arXiv 1801.09414)."""
    one_N = torch.ones_like(cosine_N)
    return Target(cosine_N.clamp(-1, 1) - margin_N, one_N, -one_N)


@dataclass(frozen=True, slots=True)
class Combined:
    """psi = cos(m1 theta + m2) - m3 while m1 theta + m2 <= pi, then its continuation with a slope of 1 in the cosine.

    The three margins together are section 2.4 of ArcFace (arXiv 1801.07698): m1 multiplies the angle (SphereFace), m2
    is added to it (ArcFace), m3 taken from the cosine (CosFace). The margin of a row is m2. m1 >= 1.
    """

    m1: float = 1.0
    m3: float = 0.0

    def __call__(self, cosine_N: Tensor, margin_N: Tensor) -> Target:
        cosine_N = cosine_N.clamp(-1, 1)
        sin_N = ((1 - cosine_N) * (1 + cosine_N)).clamp_min(_MIN_SIN_SQUARED).sqrt()
        turned_N = self.m1 * torch.atan2(sin_N, cosine_N) + margin_N  # arccos would lose the small angles
        end_N = (math.pi - margin_N) / self.m1
        inside_N = turned_N < math.pi
        sin_turned_N = turned_N.sin()
        return Target(
            torch.where(inside_N, turned_N.cos() - self.m3, cosine_N - end_N.cos() - 1 - self.m3),
            torch.where(inside_N, self.m1 * sin_turned_N / sin_N, torch.ones_like(cosine_N)),
            torch.where(inside_N, -sin_turned_N, -end_N.sin() / self.m1),
        )


def arcface_straight_through(cosine_N: Tensor, margin_N: Tensor) -> Target:
    """psi = cos(theta + m) for every angle, with the slope of the plain cosine.

    What insightface trains with: its margin is applied without gradient, so that sin(theta + m) / sin(theta) is
    missing, and beyond theta = pi - m its logit rises again. For going on with what was trained so.
    """
    psi_N = _arcface_inside(cosine_N.clamp(-1, 1), margin_N).psi_N
    return Target(psi_N, torch.ones_like(psi_N), torch.zeros_like(psi_N))


def target_margin(loss: str, *, m1: float = 1.0, m3: float = 0.0, straight_through: bool = False) -> TargetMargin:
    """The margin of the target that `head.loss` names; magface and curricularface apply ArcFace's, adaface its own.

    m1, m3: of "combined" only. straight_through: of "arcface" only. CosFace's slope is 1 either way. Raises ValueError
    for another name, or a setting that the loss does not have.
    """
    if straight_through and loss not in ("arcface", "cosface"):
        raise ValueError(f"straight_through: there is none for the loss {loss}; use arcface or cosface")
    if loss == "combined":
        return Combined(m1, m3)
    if (m1, m3) != (1.0, 0.0):
        raise ValueError(f"m1, m3: expected 1 and 0 with the loss {loss}, got {m1} and {m3}: use combined")
    known = {
        "arcface": arcface_straight_through if straight_through else arcface,
        "cosface": cosface,
        **dict.fromkeys(("magface", "adaface", "curricularface"), arcface),
    }
    try:
        return known[loss]
    except KeyError:
        raise ValueError(f"loss: expected {', '.join(known)} or combined, got {loss!r}") from None
