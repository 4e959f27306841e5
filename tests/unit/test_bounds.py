"""Bounds on angles: conservative, tight enough to be of use, and cut where comparing costs least."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clustering.nearest.bounds import (
    FAR,
    angles_at_least,
    angles_at_most,
    best_threshold,
    drift_angles,
    passing_counts,
    thresholds,
)
from tests.nearest_cases import unit


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_drift_is_rounded_up_a_little(size: float) -> None:
    old_SD = unit(123, 252, seed=1)
    new_SD = F.normalize(old_SD + size * unit(123, 252, seed=2))
    cross_S = ((old_SD.double() - new_SD.double()).norm(dim=1) / 2).clamp(max=1)
    true_S = 2 * torch.asin(cross_S)
    found_S = drift_angles(old_SD, new_SD).double()
    assert (found_S >= true_S).all()
    assert (found_S <= true_S * (1 + 1e-4) + 3e-5).all()


def test_centres_that_stay_and_that_begin() -> None:
    old_SD = unit(3, 7, seed=3)
    new_SD = old_SD.clone()
    old_SD[1] = 0
    new_SD[2] = -new_SD[2]
    assert drift_angles(old_SD, new_SD)[:2].tolist() == [0, FAR]
    assert drift_angles(old_SD, new_SD)[2] >= math.pi - 1e-3


def test_angles_are_on_the_safe_side() -> None:
    angle_P = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    cosine_P = angle_P.cos()
    for off in (-4e-6, 0.0, 4e-6):
        assert (angles_at_least(cosine_P + off, 4e-6) <= angle_P).all()
        assert (angles_at_most(cosine_P + off, 4e-6) >= angle_P).all()
    assert (angles_at_most(cosine_P, 4e-6) - angles_at_least(cosine_P, 4e-6)).max() < 0.01
    assert math.pi < angles_at_least(torch.tensor([float("-inf")]), 4e-6) < FAR


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_that_of_trying_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, K = 507, 123
    gap_P = torch.randn(P, generator=generator) * 0.2 + 0.1
    drift_K = torch.rand(K, generator=generator) ** 4
    drift_K[torch.rand(K, generator=generator) < 0.2 * (seed % 4)] = 0
    if seed == 0:
        drift_K.zero_()
    delta_T = thresholds(drift_K)
    assert delta_T[0] == 0
    assert delta_T[-1] == drift_K.max()
    assert (delta_T.diff() > 0).all()
    passing_T = passing_counts(gap_P[:200], delta_T) + passing_counts(gap_P[200:], delta_T)
    assert passing_T.tolist() == [int((gap_P > delta).sum()) for delta in delta_T]

    def cost(delta: float) -> int:
        passing, lively = int((gap_P > delta).sum()), int((drift_K > delta).sum())
        return passing * lively + (P - passing) * K

    delta = best_threshold(delta_T, passing_T, drift_K, P)
    assert cost(delta) == min(cost(float(other)) for other in delta_T)
