"""The command line from records to results: what a run leaves behind, and that settings do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.conftest import Run

MATRIX: dict[str, tuple[int, tuple[str, ...]]] = {
    "joint loss on 2 ranks": (2, ()),
    "without clusters": (1, ("clustering.enabled=false",)),
    "cosface, sampled centres, adamw": (
        2,
        ("head.loss=cosface", "head.sample_rate=0.3", "optim.name=adamw", "optim.lr=0.002", "optim.schedule=cosine"),
    ),
    "accumulation, bf16, warm-up": (
        1,
        ("train.epochs=4", "train.accumulation=2", "train.precision=bf16", "optim.warmup_epochs=1"),
    ),
    "dali": (1, ("data.backend=dali",)),
}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", MATRIX)
def test_runs_to_the_end_and_learns(train: Run, tmp_path: Path, name: str) -> None:
    ranks, settings = MATRIX[name]
    done = train(ranks, "train.epochs=6", *settings)
    assert done.returncode == 0, done.stderr
    log = _metrics(tmp_path / "run")
    assert log[-1]["loss/margin"] < log[0]["loss/margin"], "the loss must fall"
    assert (tmp_path / "run" / "backbone.pt").is_file()
    if "clustering.enabled=false" not in settings:
        assert log[-1]["clusters/version"] >= 2
        assert log[-1]["loss/contrastive"] > 0


def test_tensorboard_holds_what_the_readme_promises(train: Run, tmp_path: Path) -> None:
    done = train(2, "train.epochs=4", "eval.sets=[verification.bin]", "train.histogram_steps=8")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "loss/total",
        "loss/margin",
        "loss/contrastive",
        "loss/alignment",
        "throughput/images_per_second",
        "throughput/images_per_second_per_rank",
        "time/data_wait_ms",
        "time/head_ms",
        "optim/learning_rate",
        "optim/gradient_norm",
        "clusters/version",
        "verification/verification/accuracy",
        "verification/verification/tar@far=1e-1",
    } <= set(tags["scalars"])
    assert {"clusters/margins", "clusters/hard_level"} <= set(tags["histograms"])
    margins = events.Histograms("clusters/margins")[-1].histogram_value
    assert margins.num == 24, "every class counts once, over all ranks"
    assert margins.sum / margins.num == pytest.approx(0.3, abs=0.02)
    checks = [json.loads(line) for line in (tmp_path / "run" / "verification.jsonl").read_text().splitlines()]
    assert [check["step"] for check in checks] == [0, 8, 16, 24, 32]
