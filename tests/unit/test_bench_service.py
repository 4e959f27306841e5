"""The benchmark of the service: how often a step needs each part, and a small run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import service_step
from benchmarks.service import HEADER, Shape, how_often, main

ROOT = Path(__file__).parents[2]


def test_parts_are_needed_as_often_as_the_counts_say() -> None:
    """100 images a class and 4 ranks of 10 images: 250 steps an epoch."""
    shape = Shape(images=10_000, classes=100, batch=10, ranks=4, extra=0.25, iterations=2, epochs=4)
    assert shape.clusters == 125
    assert shape.steps == 250
    often = how_often(shape)
    assert often["backbone"] == 10
    assert often["head"] == 40 * 25
    assert often["assign"] * 250 == pytest.approx(2 * 2500 * 125), "every sample with every cluster, twice an epoch"
    assert often["mean"] * 250 * 4 == pytest.approx((2 * 4 + 1) * 2500), "and once more at the very first"
    assert often["contrastive"] == 40 * 125 / 4


def test_ms1mv3() -> None:
    shape = Shape()
    assert shape.clusters == 107_446
    assert shape.batch * shape.ranks == 1024


def test_a_small_run_writes_both_tables(tmp_path: Path) -> None:
    out = tmp_path / "service.md"
    command = [sys.executable, "-m", "benchmarks.service", "--small", "--epochs", "3", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [*command, "--data", str(tmp_path / "data")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    text = out.read_text(encoding="utf-8")
    assert " | ".join(HEADER) in text
    assert "1 refreshes in 10 timed steps" in text
    assert all(f"| {name}: " in text for name in how_often(Shape()))
    times, parts = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert len(times["plain"]) == len(times["clusters"]) == 10
    assert parts.keys() == how_often(Shape()).keys()
    assert all(seconds > 0 for seconds in parts.values())


@pytest.mark.parametrize("arguments", [["--epochs", "2"], ["--epochs", "two"], ["--only", "nothing"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_step_of_a_small_set_is_timed_with_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.md"
    sizes = [
        "--images",
        "300",
        "--classes",
        "12",
        "--batch",
        "4",
        "--backbone",
        "small",
        "--steps",
        "3",
        "--warmup",
        "1",
    ]
    assert service_step.main([*sizes, "--device", "cpu", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "| a step | plain |" in text
    assert "version 1, ramp 1" in text
    (row,) = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [len(row[arm]) for arm in ("plain", "clusters")] == [3, 3]
    assert min(row["plain"] + row["clusters"]) > 0
    assert "+0.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--classes", "1"], ["--images", "5", "--classes", "9"], ["--steps", "0"], ["--warmup", "-1"]]
)
def test_sizes_that_cannot_be_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        service_step.main([*wrong, "--device", "cpu"])
    assert ended.value.code == 2


def test_labels_have_a_long_tail_and_every_class() -> None:
    labels_N = service_step.long_tailed_labels(5000, 60, np.random.default_rng(0))
    counts_C = np.bincount(labels_N, minlength=60)
    assert len(labels_N) == 5000
    assert counts_C.min() >= 1
    assert counts_C[:6].sum() > 3 * counts_C[-6:].sum()
