"""MagFace, AdaFace, CurricularFace: their margins against the papers' formulas, slopes against autograd, statistics
against plain ones.

Legend: N rows, c classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partial_fc.adaptive import AdaFace, AdaFaceTarget, CurricularFace, MagFace
from partial_fc.margins import arcface
from partial_fc.negatives import HardNegatives, InterclassFilter

MAGFACE = MagFace(length_low=10.0, length_high=110.0, margin_low=0.45, margin_high=0.8)


def _slope(values: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), of)[0]


def test_magface_margin_is_a_line_between_its_ends() -> None:
    length_N = torch.tensor([0.5, 9.0, 10.5, 35.0, 60.0, 109.0, 111.0, 1e4], dtype=torch.float64, requires_grad=True)
    margin_N = MAGFACE.margin(length_N)
    expected = [0.45, 0.45, 0.45175, 0.5375, 0.625, 0.7965, 0.8, 0.8]
    torch.testing.assert_close(margin_N.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    inside_N = (length_N > 10) & (length_N < 110)
    torch.testing.assert_close(_slope(margin_N, length_N), torch.where(inside_N, 0.0035, 0.0).double())


def test_magface_regulariser_is_least_at_the_longest() -> None:
    """g(a) = a / u^2 + 1 / a of the paper: convex, zero slope at u = length_high; straight below a length of 1."""
    length_N = torch.linspace(1.0, 300, 3000, dtype=torch.float64).requires_grad_()
    value_N = MAGFACE.regulariser(length_N)
    assert abs(length_N[value_N.argmin()].item() - 110) < 0.1
    slope_N = _slope(value_N, length_N)
    torch.testing.assert_close(slope_N[1:], 1 / 110**2 - 1 / length_N[1:].detach().square())
    assert (slope_N.diff()[1:] > 0).all()
    short_N = torch.tensor([0.0, 1e-6, 0.5], requires_grad=True)
    value_N = MAGFACE.regulariser(short_N)
    torch.testing.assert_close(value_N.detach(), (short_N / 110**2 + 2 - short_N).detach())
    torch.testing.assert_close(_slope(value_N, short_N), torch.full((3,), 1 / 110**2 - 1))


@pytest.mark.parametrize("quality", [-1.0, -0.6, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.4, 0.75])
def test_adaface_is_the_papers_margin_function(quality: float, margin: float) -> None:
    """cos(theta + g_angle) - g_add with g_angle = -m z and g_add = m z + m, while the angle stays in (0, pi)."""
    theta_N = torch.linspace(0.01, math.pi - 0.01, 2001, dtype=torch.float64)
    theta_N = theta_N[((theta_N - margin * quality) > 0) & ((theta_N - margin * quality) < math.pi)]
    cosine_N = theta_N.cos().requires_grad_()
    margin_N = torch.full_like(cosine_N, margin).requires_grad_()
    z_N = torch.full_like(theta_N, quality)
    truth_N = (cosine_N.arccos() - margin_N * z_N).cos() - (margin_N * z_N + margin_N)
    found = AdaFaceTarget(z_N)(cosine_N.detach(), margin_N.detach())
    torch.testing.assert_close(found.psi_N, truth_N.detach(), rtol=1e-12, atol=1e-12)
    by_cosine_N, by_margin_N = torch.autograd.grad(truth_N.sum(), (cosine_N, margin_N))
    torch.testing.assert_close(found.by_cosine_N, by_cosine_N, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.by_margin_N, by_margin_N, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quality", [-1.0, -0.6, 0.0, 0.3, 1.0])
def test_adaface_rewards_no_angle_for_leaving_the_class(quality: float) -> None:
    theta_N = torch.linspace(1e-4, math.pi - 1e-4, 20001, dtype=torch.float64)
    z_N = torch.full_like(theta_N, quality)
    psi_N, slope_N, _ = AdaFaceTarget(z_N)(theta_N.cos(), torch.full_like(theta_N, 0.4))
    assert (psi_N.diff() < 0).all()
    assert (slope_N >= 0).all()
    assert psi_N.diff().abs().max() < 1e-3, "no jump"


def test_adaface_of_poor_images_is_arcface_and_of_middling_ones_cosface() -> None:
    cosine_N, margin_N = torch.linspace(-1, 1, 401), torch.full((401,), 0.4)
    for found, expected in zip(
        AdaFaceTarget(-torch.ones(401))(cosine_N, margin_N), arcface(cosine_N, margin_N), strict=True
    ):
        assert torch.equal(found, expected)
    torch.testing.assert_close(AdaFaceTarget(torch.zeros(401))(cosine_N, margin_N).psi_N, cosine_N - 0.4)


def _lengths(*shape: int) -> Tensor:
    return 20 + 6 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_adaface_statistics_run_over_labelled_rows() -> None:
    length_TN = _lengths(4, 123)
    valid_N = torch.arange(123) % 5 != 2
    adaface = AdaFace(spread=0.333, momentum=0.9)
    mean = deviation = None
    for length_N in length_TN:
        found = adaface(length_N, valid_N)
        counted = length_N[valid_N].double()
        new_mean, new_deviation = counted.mean(), counted.std()
        mean = new_mean if mean is None else 0.9 * mean + 0.1 * new_mean
        deviation = new_deviation if deviation is None else 0.9 * deviation + 0.1 * new_deviation
        torch.testing.assert_close(adaface.mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(adaface.deviation.double(), deviation, rtol=1e-6, atol=0)
        z_N = ((length_N.double() - mean) * 0.333 / deviation).clamp(-1, 1)
        torch.testing.assert_close(found.quality_N.double(), z_N, rtol=1e-5, atol=1e-5)
    assert adaface.batches == 4
    before = {name: value.clone() for name, value in adaface.state_dict().items()}
    adaface.eval()
    adaface(3 * length_TN[0], valid_N)
    assert all(torch.equal(value, before[name]) for name, value in adaface.state_dict().items())


def test_adaface_quality_ends_at_one_and_has_no_gradient() -> None:
    adaface = AdaFace(spread=0.333, momentum=0.99)
    adaface(_lengths(123), torch.ones(123, dtype=torch.bool))
    adaface.eval()
    length_N = torch.tensor([0.0, 1e6], requires_grad=True)
    quality_N = adaface(length_N, torch.ones(2, dtype=torch.bool)).quality_N
    assert quality_N.tolist() == [-1, 1]
    assert not quality_N.requires_grad


@pytest.mark.parametrize("labelled", [0, 1])
def test_batches_too_small_for_a_deviation_leave_adaface_as_it_is(labelled: int) -> None:
    valid_N = torch.arange(7) < labelled
    adaface = AdaFace(spread=0.333, momentum=0.9)
    assert torch.isfinite(adaface(_lengths(7), valid_N).quality_N).all(), "before any other batch too"
    assert (adaface.mean, adaface.deviation, adaface.batches) == (0, 0, 0)
    adaface(_lengths(7), valid_N | True)
    mean = adaface.mean.clone()
    adaface(2 * _lengths(7), valid_N)
    assert adaface.mean == mean
    assert adaface.batches == 1


def test_equal_lengths_are_of_middling_quality() -> None:
    adaface = AdaFace(spread=0.333, momentum=0.9)
    assert (adaface(torch.full((7,), 20.0), torch.ones(7, dtype=torch.bool)).quality_N == 0).all()


def _curricular_step(module: CurricularFace, cosine_N: Tensor, valid_N: Tensor) -> HardNegatives:
    everywhere_N = torch.ones_like(valid_N)
    return module(cosine_N, torch.full_like(cosine_N, 0.5), everywhere_N, arcface, valid_N, None)


def test_curricular_t_runs_over_labelled_rows() -> None:
    cosine_TN = torch.rand(5, 123, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.4
    valid_N = torch.arange(123) % 4 != 1
    module, t = CurricularFace(momentum=0.9), 0.0
    for cosine_N in cosine_TN:
        negatives = _curricular_step(module, cosine_N, valid_N)
        t = 0.9 * t + 0.1 * cosine_N[valid_N].double().mean().item()
        assert module.t.item() == pytest.approx(t, rel=1e-6)
        assert negatives.t == module.t, "the step sees the new t, as in the authors' code"
        assert torch.equal(negatives.psi_N, arcface(cosine_N, torch.full_like(cosine_N, 0.5)).psi_N)
    before = module.t.clone()
    _curricular_step(module, cosine_TN[0], torch.zeros_like(valid_N))
    assert module.t == before, "no labelled row"
    module.eval()
    _curricular_step(module, cosine_TN[0], valid_N)
    assert module.t == before


def test_curricular_negatives_keep_the_t_of_their_step() -> None:
    """Their gradient may be made after another micro-batch has moved t."""
    module, valid_N = CurricularFace(momentum=0.5), torch.ones(3, dtype=torch.bool)
    first = _curricular_step(module, torch.full((3,), 0.8), valid_N)
    assert first.t == pytest.approx(0.4)
    _curricular_step(module, torch.full((3,), 0.2), valid_N)
    assert module.t == pytest.approx(0.3)
    assert first.t == pytest.approx(0.4)


def test_a_negative_t_counts_as_none() -> None:
    module = CurricularFace(momentum=0.5)
    assert _curricular_step(module, torch.full((3,), -0.6), torch.ones(3, dtype=torch.bool)).t == 0
    assert module.t < 0


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_hard_negatives_are_the_papers(t: float) -> None:
    """N(t, cos) = cos (t + cos) where cos exceeds the target's psi, else cos."""
    cosine_cN = torch.linspace(-1, 1, 507, dtype=torch.float64)[:, None].repeat(1, 3).requires_grad_()
    psi_N = torch.tensor([-0.9, 0.1, 0.7], dtype=torch.float64)
    negatives = HardNegatives(torch.tensor(t, dtype=torch.float64), psi_N)
    truth_cN = torch.where(cosine_cN > psi_N, cosine_cN * (t + cosine_cN), cosine_cN)
    value_cN, slope_cN = negatives(cosine_cN.detach())
    torch.testing.assert_close(value_cN, truth_cN.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(slope_cN, _slope(truth_cN, cosine_cN), rtol=1e-14, atol=1e-14)
    assert value_cN.max() <= negatives.bound


def test_the_filter_lets_cosines_above_its_threshold_count_as_zero() -> None:
    cosine_cN = torch.tensor([[-0.5, 0.0, 0.2], [0.2001, 0.9, 0.1]])
    value_cN, slope_cN = InterclassFilter(0.2)(cosine_cN)
    assert torch.equal(slope_cN, torch.tensor([[1.0, 1, 1], [0, 0, 1]]))
    assert torch.equal(value_cN, cosine_cN * slope_cN)
