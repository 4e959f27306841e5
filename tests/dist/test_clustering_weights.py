"""`level_weight`: samples of hard classes count for less in the features' gradient, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clustering.contrastive import contrastive_loss
from clustering.margins import class_weights
from clustering.weighting import weighted_gradient
from configs.schema import ClusteringConfig, ConfigError
from partial_fc.collectives import GatheredBatch
from tests.dist.service_cases import NOISY, batch_at, build, train
from tests.ranks import WORLD_SIZES, RankPool


@settings(max_examples=200, deadline=None)
@given(levels=st.lists(st.floats(0, 1), min_size=1, max_size=30), kappa=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_weights_are_positive_fall_with_the_level_and_have_the_mean_one(
    levels: list[float], kappa: float, seed: int
) -> None:
    h_C = torch.tensor(levels, dtype=torch.float64)
    n_C = torch.randint(1, 50, h_C.shape, generator=torch.Generator().manual_seed(seed)).double()
    g_C = class_weights(h_C, n_C, kappa)
    assert (g_C > 0).all()
    assert float((g_C * n_C).sum() / n_C.sum()) == pytest.approx(1, abs=1e-12)
    assert (g_C[h_C.argsort()].diff() <= 1e-15).all()


@pytest.mark.parametrize("wanted", ["no kappa", "equal levels", "no samples"])
def test_without_guidance_all_count_exactly_alike(wanted: str) -> None:
    h_C = torch.full((7,), 0.3, dtype=torch.float64) if wanted == "equal levels" else torch.rand(7).double()
    n_C = torch.zeros(7).double() if wanted == "no samples" else torch.arange(1.0, 8).double()
    assert torch.equal(class_weights(h_C, n_C, 0.0 if wanted == "no kappa" else 0.4).float(), torch.ones(7))


def test_the_rows_are_themselves_and_their_gradient_is_weighted() -> None:
    x_ND = torch.randn(5, 3, requires_grad=True)
    weight_N, upstream_ND = torch.rand(5), torch.randn(5, 3)
    weighted = weighted_gradient(x_ND, weight_N)
    assert torch.equal(weighted, x_ND)
    weighted.backward(upstream_ND)
    assert x_ND.grad is not None
    assert torch.equal(x_ND.grad, weight_N[:, None] * upstream_ND)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_settings_that_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="level_weight"):
        ClusteringConfig(level_weight=value)


def _weights_of_each_step(group: dist.ProcessGroup, kappa: float) -> list[dict[str, Any]]:
    service = build(group, NOISY, level_weight=kappa)
    seen = []

    def look(step: int, batch: GatheredBatch) -> None:
        published, row = service._published, service.row_weights(batch)
        full = None if published is None else published.g_C[batch.labels_N]
        seen.append({"ramp": service.ramp(step), "row": row, "full": full, "x": service.for_head(batch).x_ND.detach()})

    train(service, NOISY, each=look)
    return seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_come_with_the_ramp_and_are_the_same_on_every_rank(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _weights_of_each_step, 0.4)
    (alone,) = ranks.run(1, _weights_of_each_step, 0.4)
    spread = 0.0
    for step, one in enumerate(alone):
        if one["ramp"] == 0:
            assert one["row"] is None
        else:
            assert torch.allclose(one["row"], 1 + one["ramp"] * (one["full"] - 1))
            spread = max(spread, float(one["row"].max() - one["row"].min()))
        for part in parts:
            assert (part[step]["row"] is None) == (one["row"] is None)
            assert one["row"] is None or torch.equal(part[step]["row"], one["row"])
            assert torch.equal(part[step]["x"], one["x"])
    assert spread > 0.1


def _stored(group: dist.ProcessGroup, momentum: float) -> Tensor:
    service = build(group, {**NOISY, "drift": 0.1}, bank_momentum=momentum)
    train(service, {**NOISY, "drift": 0.1})
    return service.bank.points().x_PD.clone()


def test_the_service_hands_its_bank_the_momentum(ranks: RankPool) -> None:
    ((newest,), (averaged,)) = (ranks.run(1, _stored, momentum) for momentum in (0.0, 0.5))
    assert (newest - averaged).abs().max() > 0.01
    assert torch.allclose(averaged.norm(dim=1), torch.ones(()).double())


def test_without_the_setting_nothing_is_weighted(ranks: RankPool) -> None:
    (seen,) = ranks.run(1, _weights_of_each_step, 0.0)
    assert any(step["ramp"] > 0 for step in seen)
    assert all(step["row"] is None for step in seen)


def _contrastive(group: dist.ProcessGroup, kappa: float) -> tuple[float, float, float]:
    """The service's, by its weights, and by none, after some training."""
    service = build(group, NOISY, level_weight=kappa)
    train(service, NOISY, stop=14)
    _, batch = batch_at(group, NOISY, 14)
    assert service._published is not None
    assert service._candidates is not None
    suspect_N = service._published.cluster_of(batch)[1]
    plain, weighted = (
        float(contrastive_loss(batch, service._candidates, suspect_N, temperature=0.1, weight_N=weight_N))
        for weight_N in (None, service.row_weights(batch))
    )
    return float(service.contrastive(batch)), weighted, plain


def test_the_contrastive_loss_takes_the_weights(ranks: RankPool) -> None:
    ((found, weighted, plain),) = ranks.run(1, _contrastive, 0.4)
    assert found == weighted
    assert abs(found - plain) > 1e-4 * plain
    ((found, weighted, plain),) = ranks.run(1, _contrastive, 0.0)
    assert found == weighted == plain


def _gradients(group: dist.ProcessGroup, step: int) -> tuple[Tensor, Tensor]:
    """Of the sum of this rank's rows through `for_head`, and the weights."""
    service = build(group, NOISY, level_weight=0.4)
    train(service, NOISY, stop=step)
    x_BD, batch = batch_at(group, NOISY, step)
    service.for_head(batch).x_ND.sum().backward()
    weight_N = service.row_weights(batch)
    assert weight_N is not None
    assert x_BD.grad is not None
    return x_BD.grad[:, 0], weight_N


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_gradient_that_comes_back_is_weighted_row_by_row(ranks: RankPool, world_size: int) -> None:
    """Each of the ranks adds a gradient of one for every row."""
    parts = ranks.run(world_size, _gradients, 14)
    found = torch.cat([part[0] for part in parts])
    assert torch.allclose(found, world_size * parts[0][1])
