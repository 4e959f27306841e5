"""The demo, small: every stage runs, the table says what was measured, and what it names is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import call
from training.demo import SMALL, pack


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call("-m", "training.demo", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    checks = [json.loads(line) for line in (tmp_path / "run" / "verification.jsonl").read_text().splitlines()]
    for check in (checks[0], checks[-1]):
        assert f"{100 * check['accuracy']:.1f}%" in done.stdout
        assert f"{100 * check['tar@far=1e-2']:.1f}%" in done.stdout
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert len(classes) == 10
    assert classes[0]["hard_level"] < classes[-1]["hard_level"]
    for row in (classes[0], classes[-1]):
        assert f"{row['hard_level']:.3f}" in done.stdout
        assert f"{row['margin']:.3f}" in done.stdout
    for name in ("roc_verification.png", "classes.png", "demo.jpg"):
        with Image.open(tmp_path / "run" / name) as image:
            image.load()
    printed = done.stdout.replace("\n", " ")
    for path in ("run/tensorboard", "run/roc_verification.png", "run/classes.png"):
        assert str(tmp_path / path) in printed
    packed = (tmp_path / "data" / "train.rec").stat().st_mtime_ns
    capsys.readouterr()
    pack(tmp_path / "data", SMALL)
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "data" / "train.rec").stat().st_mtime_ns == packed


def test_demo_says_which_step_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = call("-m", "training.demo", "--small", "--out", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "error: `data pack synthetic" in done.stderr
    assert 'demo.py", line' not in done.stderr
