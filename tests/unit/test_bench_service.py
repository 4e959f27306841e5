"""The benchmark of the service: how often a step needs each part, and a small run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
