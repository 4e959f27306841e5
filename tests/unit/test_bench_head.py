"""The head's benchmark on tiny sizes: every row is there, the file too, and its figures make sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.head import _HEADER, Row, _parser, cells, dense_bytes, main, why_no_dense

ROOT = Path(__file__).parents[2]
TINY = ("--batch", "8", "--dim", "16", "--repeats", "2", "--threads", "1", "--device", "cpu")


def _table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| " + " | ".join(_HEADER) + " |"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow  # six processes that import torch
def test_writes_every_row_with_positive_ratios(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "head.md"
    # The limit leaves the dense head out at 3000 classes, not at 60.
    command = ["-m", "benchmarks.head", "--classes", "60", "3000", *TINY, "--memory-limit", "0.001", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    for fact in ("date: ", "hardware: ", "load before: ", "versions: ", "commit: ", "command: `python -m benchmarks"):
        assert f"- {fact}" in text
    assert "- dense head at 3,000 classes: left out: it needs" in text
    rows = _table(text)
    heads = ["dense", "all classes", "rate 0.1"]
    assert [row[:2] for row in rows] == [[classes, head] for classes in ("60", "3,000") for head in heads]
    for row in rows:
        figures = dict(zip(_HEADER, row, strict=True))
        if row[:2] == ["3,000", "dense"]:
            assert figures["fwd+bwd ms"] == "skipped"
            continue
        for name in ("fwd+bwd ms", "step ms", "speed / all"):
            assert 0 < float(figures[name]) < float("inf")
        assert float(figures["fwd+bwd ms"]) <= float(figures["step ms"])
        if row[0] == "60":
            assert 0 < float(figures["speed / dense"]) < float("inf")
        assert row[1] in done.stdout


def test_ratios_of_a_row() -> None:
    rows = [
        Row(10, "dense", (0.3, 0.3, 0.9), (0.4, 0.4, 1.0), 800),
        Row(10, "streaming", (0.1, 0.1, 0.1), (0.2, 0.2, 0.2), 200),
        Row(10, "sampled", (0.01, 0.02, 0.03), (0.02, 0.04, 0.06), 100),
    ]
    texts = [dict(zip(_HEADER, cells(row, rows, 0.1), strict=True)) for row in rows]
    assert [text["speed / dense"] for text in texts] == ["1.00", "2.00", "10.00"]
    assert [text["speed / all"] for text in texts] == ["0.50", "1.00", "5.00"]
    assert [text["MB / dense"] for text in texts] == ["1.000", "0.250", "0.125"]


def test_dense_head_is_left_out_with_a_reason() -> None:
    args = _parser().parse_args(["--memory-limit", "1"])
    assert not why_no_dense(10_000, args, torch.device("cpu"))
    assert "limit is 1 GB" in why_no_dense(360_232, args, torch.device("cpu"))
    assert dense_bytes(2, 128, 512) < dense_bytes(3, 128, 512)


_PEAK = """
import torch
from benchmarks.memory import peak_extra

kept = []
def work():
    torch.ones(50_000_000, dtype=torch.uint8)
    kept.append(torch.ones(30_000_000, dtype=torch.uint8))

before = torch.ones(120_000_000, dtype=torch.uint8)
del before  # an earlier, higher peak
print(peak_extra(work, torch.device("cpu")))
"""


def test_peak_is_that_of_the_work_alone() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    printed = done.stdout.strip()
    assert printed == "None" or 45_000_000 < int(printed) < 90_000_000


@pytest.mark.parametrize("wrong", [("--classes", "1"), ("--batch", "0"), ("--sample-rate", "2"), ("--warmup", "-1")])
def test_wrong_arguments_are_one_error(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
