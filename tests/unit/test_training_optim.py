"""Learning rate as a function of the step, and the two optimizers that share it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from configs.schema import HeadConfig, OptimConfig
from partial_fc.optim import CentreAdamW, CentreSGD
from training.optim import build_optimizers, learning_rate, set_learning_rate


def _rates(config: OptimConfig, total: int = 100, global_batch: int = 512) -> list[float]:
    return [
        learning_rate(step, total_steps=total, steps_per_epoch=10, global_batch=global_batch, config=config)
        for step in range(total + 1)
    ]


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_warms_up_to_the_peak_and_decays_to_zero(schedule: str) -> None:
    rates = _rates(OptimConfig(lr=0.4, schedule=schedule, warmup_epochs=2))  # type: ignore[arg-type]
    assert rates[:20] == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(0.4)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[20:]))
    assert rates[100] == pytest.approx(0, abs=1e-12)
    halfway = {"polynomial": 0.4 * 0.25, "cosine": 0.4 * 0.5}[schedule]
    assert rates[60] == pytest.approx(halfway)


def test_scales_linearly_with_the_batch_unless_told_not_to() -> None:
    assert _rates(OptimConfig(lr=0.1, reference_batch=512), global_batch=1024)[0] == pytest.approx(0.2)
    assert _rates(OptimConfig(lr=0.1, reference_batch=0), global_batch=1024)[0] == pytest.approx(0.1)


def test_warm_up_longer_than_the_run_never_overshoots() -> None:
    assert max(_rates(OptimConfig(lr=0.1, warmup_epochs=50), total=20)) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "kind"), [("sgd", CentreSGD), ("adamw", CentreAdamW)])
def test_both_optimizers_have_the_same_settings(name: str, kind: type) -> None:
    backbone, centres = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))
    pair = build_optimizers([backbone], [centres], OptimConfig(name=name, weight_decay=0.3), HeadConfig(), seed=0)  # type: ignore[arg-type]
    assert isinstance(pair[1], kind)
    set_learning_rate(pair, 0.125)
    for optimizer in pair:
        assert optimizer.param_groups[0]["lr"] == 0.125
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
