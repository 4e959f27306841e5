"""HEALTHCHECK of the image: which process it looks at, and what it takes for a run that hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from docker import health

TICKS = os.sysconf("SC_CLK_TCK")


def _process(folder: Path, number: int, words: list[str], *, started_s: int) -> None:
    place = folder / str(number)
    place.mkdir()
    (place / "cmdline").write_bytes("\0".join([*words, ""]).encode())
    fields = ["S", *["0"] * 18, str(started_s * TICKS), *["0"] * 10]
    (place / "stat").write_text(f"{number} (a name) with) {' '.join(fields)}\n", encoding="utf-8")


@pytest.fixture
def processes(tmp_path: Path) -> Path:
    (tmp_path / "uptime").write_text("1000.00 1.00\n", encoding="utf-8")
    _process(tmp_path, 1, ["/sbin/tini", "--", "python"], started_s=100)
    _process(tmp_path, 12, ["python", "-c", "1"], started_s=100)
    return tmp_path


def test_it_finds_the_launcher_and_how_long_it_has_run(processes: Path) -> None:
    _process(processes, 7, ["python", "-m", "docker.launch", "--config", "a b.yaml"], started_s=400)
    assert health.launched(processes) == (["--config", "a b.yaml"], 600)


def test_without_a_launcher_there_is_nothing_healthy(
    processes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = health.launched
    monkeypatch.setattr(health, "launched", lambda: found(processes))
    assert health.main() == 1
    assert capsys.readouterr().out == "expected `python -m docker.launch` to run here, found no such process\n"


def test_the_folder_is_that_of_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: set}\ntrain: {output: runs/of_recipe}\n", encoding="utf-8")
    assert health.output_folder(["--config", str(recipe)]) == Path("runs/of_recipe")
    assert health.output_folder([f"--config={recipe}", "--set=train.output=/runs/a"]) == Path("/runs/a")


@pytest.mark.parametrize(
    ("line_s", "age_s", "quiet_s"),
    [
        (None, 50, 50),  # nothing told yet
        (300, 50, 50),  # the run before told it
        (20, 50, 20),
    ],
)
def test_silence_counts_from_the_last_line_or_the_start(
    tmp_path: Path, line_s: float | None, age_s: float, quiet_s: float
) -> None:
    if line_s is not None:
        file = tmp_path / "metrics.jsonl"
        file.touch()
        os.utime(file, (0, time.time() - line_s))
    assert health.silence(tmp_path, age_s) == pytest.approx(quiet_s, abs=5)


@pytest.mark.parametrize(("allowed", "code"), [("900", 0), ("500", 1)])
def test_a_run_that_has_been_silent_for_too_long_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], allowed: str, code: int
) -> None:
    settings = ["--set=data.path=set", f"--set=train.output={tmp_path}"]
    monkeypatch.setattr(health, "launched", lambda: (settings, 600.0))
    monkeypatch.setenv("CLUSTERFACE_SILENCE_S", allowed)
    assert health.main() == code
    assert capsys.readouterr().out == (f"{tmp_path}/metrics.jsonl: last told 600 s ago, {allowed} s are let pass\n")


@pytest.mark.parametrize("text", ["soon", "nan", ""])
def test_a_silence_that_is_no_number_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(health, "launched", lambda: ([], 600.0))
    monkeypatch.setenv("CLUSTERFACE_SILENCE_S", text)
    assert health.main() == 1
    assert capsys.readouterr().out == f"CLUSTERFACE_SILENCE_S: expected seconds, got {text!r}: correct it\n"
