"""Margins: values and slopes against autograd in float64, and what must hold beyond theta = pi - m."""

from __future__ import annotations

import math

import pytest
import torch

from partial_fc.margins import MARGINS, arcface
from partial_fc.reference import arcface_logit, cosface_logit

REFERENCE = {"arcface": arcface_logit, "cosface": cosface_logit}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.2])
def test_value_and_slope_equal_autograd(name: str, margin: float) -> None:
    cosine = torch.linspace(-0.9999, 0.9999, 4001, dtype=torch.float64, requires_grad=True)
    margins = torch.full_like(cosine, margin)
    truth = REFERENCE[name](cosine, margins)
    (slope,) = torch.autograd.grad(truth.sum(), cosine)
    psi, dpsi = MARGINS[name](cosine.detach(), margins)
    torch.testing.assert_close(psi, truth.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dpsi, slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("margin", [0.35, 0.5, 0.65])
def test_arcface_never_rewards_leaving_the_class(margin: float) -> None:
    theta = torch.linspace(1e-4, math.pi - 1e-4, 20001, dtype=torch.float64)
    psi, dpsi = arcface(theta.cos(), torch.full_like(theta, margin))
    assert (psi.diff() < 0).all(), "psi must fall strictly as the angle grows, past pi - m too"
    assert (dpsi >= 0).all()
    assert psi.diff().abs().max() < 2e-3, "no jump at theta = pi - m"


@pytest.mark.parametrize("name", MARGINS)
def test_zero_margin_is_the_plain_cosine_bit_for_bit(name: str) -> None:
    cosine = torch.linspace(-1, 1, 1001)
    psi, dpsi = MARGINS[name](cosine, torch.zeros_like(cosine))
    assert torch.equal(psi, cosine)
    assert torch.equal(dpsi, torch.ones_like(cosine))


@pytest.mark.parametrize("name", MARGINS)
def test_finite_at_and_past_the_poles(name: str) -> None:
    cosine = torch.tensor([-1.0000001, -1.0, 1.0, 1.0000001])
    psi, dpsi = MARGINS[name](cosine, torch.full_like(cosine, 0.5))
    assert torch.isfinite(psi).all()
    assert torch.isfinite(dpsi).all()
