"""Whole runs with planted faults: they skip, go back, and end as they should, and say why."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.step
from tests.integration.conftest import ROOT, Run, environment
from training.step import TrainStep

EVERY_4 = ("train.checkpoint_steps=4", "guard.skips_to_roll_back=3")


def plant(patch: pytest.MonkeyPatch, wanted: Callable[[int, float], bool]) -> None:
    """Images of nan in the steps in which `wanted(step, lr)` says so."""
    call, pixels = TrainStep.__call__, training.step.normalise_pixels
    bad = False

    def planted(self: TrainStep, batches: Any, *, step: int, lr: float) -> Any:
        nonlocal bad
        bad = wanted(step, lr)
        return call(self, batches, step=step, lr=lr)

    patch.setattr(TrainStep, "__call__", planted)
    patch.setattr(training.step, "normalise_pixels", lambda images: pixels(images) * (math.nan if bad else 1.0))


def _metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


_ON_ONE_RANK = """
import os, sys
import pytest
from tests.integration.test_guard import plant
import train_dist

with pytest.MonkeyPatch.context() as patch:
    plant(patch, lambda step, lr: step in (5, 6) and os.environ["RANK"] == "1")
    sys.exit(train_dist.main(sys.argv[1:]))
"""


def test_a_fault_on_one_rank_is_skipped_and_named(command: Callable[..., list[str]], tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(_ON_ONE_RANK)
    arguments = [str(script) if part == "train_dist.py" else part for part in command(2)]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for step in (6, 7):
        assert done.stderr.count(f"step {step}: skipped, the loss is not finite (learning rate 0.0") == 1
    assert done.stderr.count("embeddings that are not finite: of samples ") == 2
    assert done.stderr.count(" and 4 more") == 2, "the rows of one rank, whose BatchNorm saw the image"
    log = _metrics(tmp_path / "run")
    assert log[-1]["guard/skipped_steps"] == 2
    assert log[-1]["guard/loss_spikes"] == 0
    assert all(math.isfinite(line["loss/total"]) and math.isfinite(line["optim/gradient_norm"]) for line in log)
    weights = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_resumed_after_a_skipped_step_equals_never_stopped(
    train_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda step, _: step in (5, 6))
    for name, stops in (("whole", ()), ("parts", (6, 7))):
        for stop in (*stops, 0):
            done = train_here(f"train.stop_after_steps={stop}", "train.epochs=2", name=name)
            assert done.returncode == 0, done.stderr
        assert _metrics(tmp_path / name)[-1]["guard/skipped_steps"] == 2
    first, second = (torch.load(tmp_path / name / "backbone.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_lower_rate_from_the_checkpoint_on_is_the_cure(
    train_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda step, lr: step >= 9 and lr > 0.006)
    done = train_here(*EVERY_4, "train.stop_after_steps=14")
    assert done.returncode == 0, done.stderr
    said = (
        "3 steps in a row, up to step 12, were not finite: back to step 8; the learning rate is 0.5 of the schedule's"
    )
    assert done.stderr.count(said) == 1
    half = _metrics(tmp_path / "run")[-1]
    assert half["optim/learning_rate"] == pytest.approx(0.5 * 0.02 * (1 - 14 / 32) ** 2)
    assert half["guard/skipped_steps"] == 3
    again = train_here(*EVERY_4)
    assert again.returncode == 0, again.stderr
    assert _metrics(tmp_path / "run")[-1]["guard/skipped_steps"] == 3
    assert "back to step" not in again.stderr


def test_without_a_cure_the_run_ends_and_says_what_to_do(
    train_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, lambda step, _: step >= 5)
    none = train_here(*EVERY_4, "train.checkpoint_steps=100", name="none")
    assert none.returncode == 2
    assert "error: 3 steps in a row, up to step 8, were not finite, and there is no checkpoint" in none.stderr
    done = train_here(*EVERY_4, "guard.max_rollbacks=1")
    assert done.returncode == 2
    assert done.stderr.count("back to step 4") == 1
    assert (
        "error: 3 steps in a row, up to step 8, were not finite, after guard.max_rollbacks = 1 returns" in done.stderr
    )
    assert "lower optim.lr" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000000004\n"


def test_weights_that_are_not_finite_are_not_saved(
    train_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They become so in the last step before a checkpoint; the loss would show it in the next."""
    call, lost = TrainStep.__call__, []

    def planted(self: TrainStep, batches: Any, *, step: int, lr: float) -> Any:
        values = call(self, batches, step=step, lr=lr)
        if step == 7 and not lost:
            lost.append(step)
            with torch.no_grad():
                self.head.weight[3, 0] = torch.inf
        return values

    monkeypatch.setattr(TrainStep, "__call__", planted)
    done = train_here(*EVERY_4, "train.stop_after_steps=9")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("class centres are not finite: back to step 4; the learning rate is 0.5") == 1
    assert _metrics(tmp_path / "run")[-1]["guard/skipped_steps"] == 0
