"""Margins: values and slopes against autograd in float64, and what must hold beyond theta = pi - m."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from partial_fc.margins import Combined, TargetMargin, arcface, arcface_straight_through, cosface, target_margin
from partial_fc.reference import TargetLogit, arcface_logit, combined_logit, cosface_logit, straight_through_logit

MARGINS: dict[str, tuple[TargetMargin, TargetLogit]] = {
    "arcface": (arcface, arcface_logit),
    "cosface": (cosface, cosface_logit),
    "straight through": (arcface_straight_through, straight_through_logit),
    "combined": (Combined(1.35, 0.1), partial(combined_logit, m1=1.35, m3=0.1)),
    "multiplied alone": (Combined(2.0), partial(combined_logit, m1=2.0)),
}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.2])
def test_value_and_slope_equal_autograd(name: str, margin: float) -> None:
    cosine = torch.linspace(-0.9999, 0.9999, 4001, dtype=torch.float64, requires_grad=True)
    margins = torch.full_like(cosine, margin).requires_grad_()
    margin_of, logit_of = MARGINS[name]
    truth = logit_of(cosine, margins)
    slope, in_margin = torch.autograd.grad(truth.sum(), (cosine, margins), allow_unused=True, materialize_grads=True)
    found = margin_of(cosine.detach(), margins.detach())
    torch.testing.assert_close(found.psi_N, truth.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.by_cosine_N, slope, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.by_margin_N, in_margin, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("margin", [0.35, 0.5, 0.65])
@pytest.mark.parametrize("margin_of", [arcface, Combined(), Combined(1.35, 0.1), Combined(3.0)])
def test_no_angle_rewards_leaving_the_class(margin_of: TargetMargin, margin: float) -> None:
    theta = torch.linspace(1e-4, math.pi - 1e-4, 20001, dtype=torch.float64)
    psi, dpsi, _ = margin_of(theta.cos(), torch.full_like(theta, margin))
    assert (psi.diff() < 0).all(), "psi must fall strictly as the angle grows, past pi - m too"
    assert (dpsi >= 0).all()
    assert psi.diff().abs().max() < 2e-3, "no jump at theta = pi - m"


def test_combined_without_its_own_margins_is_arcface() -> None:
    cosine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    for found, truth in zip(
        Combined()(cosine, torch.full_like(cosine, 0.5)), arcface(cosine, torch.full_like(cosine, 0.5)), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-9)


def test_straight_through_has_arcface_values_and_the_slope_of_the_cosine() -> None:
    cosine = torch.linspace(-0.85, 1, 4001)  # below -cos(0.5) it has no continuation
    psi, dpsi, _ = arcface_straight_through(cosine, torch.full_like(cosine, 0.5))
    assert torch.equal(psi, arcface(cosine, torch.full_like(cosine, 0.5))[0])
    assert torch.equal(dpsi, torch.ones_like(cosine))


@pytest.mark.parametrize("margin_of", [arcface, cosface])
def test_zero_margin_is_the_plain_cosine_bit_for_bit(margin_of: TargetMargin) -> None:
    cosine = torch.linspace(-1, 1, 1001)
    psi, dpsi, _ = margin_of(cosine, torch.zeros_like(cosine))
    assert torch.equal(psi, cosine)
    assert torch.equal(dpsi, torch.ones_like(cosine))


@pytest.mark.parametrize("name", MARGINS)
def test_finite_at_and_past_the_poles(name: str) -> None:
    cosine = torch.tensor([-1.0000001, -1.0, 1.0, 1.0000001])
    psi, dpsi, _ = MARGINS[name][0](cosine, torch.full_like(cosine, 0.5))
    assert torch.isfinite(psi).all()
    assert torch.isfinite(dpsi).all()


@pytest.mark.parametrize(
    ("loss", "wanted", "message"),
    [
        ("softmax", {}, "or combined, got 'softmax'"),
        ("arcface", {"m1": 2.0}, "expected 1 and 0 with the loss arcface, got 2.0 and 0.0"),
        ("cosface", {"m3": 0.1}, "expected 1 and 0 with the loss cosface"),
        ("combined", {"straight_through": True}, "none for the loss combined"),
    ],
)
def test_margins_that_do_not_exist(loss: str, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_margin(loss, **wanted)
