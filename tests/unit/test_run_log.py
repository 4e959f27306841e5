"""What a run tells: a progress bar with the time left on terminals, lines elsewhere, events that outlast a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.metrics
from training.metrics import HISTOGRAM_BINS, RunLog, count_histogram


def _log(output: Path, first_step: int = 0, *, active: bool = True) -> RunLog:
    return RunLog(output, active=active, total_steps=40, first_step=first_step)


def test_a_terminal_shows_progress_with_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(training.metrics, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    log = _log(tmp_path)
    log.moved(10)
    log.scalars(10, {"loss/total": 1.25}, "loss 1.250")
    log.close()
    shown = screen.getvalue()
    for part in ("step 10/40", "loss 1.250", "left"):
        assert part in shown


def test_a_file_gets_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(tmp_path)
    log.scalars(10, {"loss/total": 1.25}, "loss 1.250")
    log.say("something else")
    log.close()
    assert capsys.readouterr().err.splitlines() == ["step 10/40  loss 1.250", "something else"]
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["step"], record["loss/total"]) == (10, 1.25)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(tmp_path, active=False)
    log.moved(1)
    log.scalars(10, {"loss/total": 1.25}, "loss 1.250")
    log.text("tag", "text")
    log.say("something else")
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_a_resumed_run_hides_the_steps_it_does_again_and_only_them(tmp_path: Path) -> None:
    first = _log(tmp_path)
    for step in (5, 10, 12):
        first.scalars(step, {"loss/total": float(step)})
    first.close()
    second = _log(tmp_path, first_step=10)
    for step in (12, 15):
        second.scalars(step, {"loss/total": 100.0 + step})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [
        (5, 5.0),
        (10, 10.0),
        (12, 112.0),
        (15, 115.0),
    ]


def test_histograms_count_every_value_and_add_up() -> None:
    values = torch.tensor([0.1, 0.15, 0.31, 0.45, 0.45, 0.9])
    parts = [count_histogram(part, 0.15, 0.45) for part in (values[:2], values[2:], values[:0])]
    whole = count_histogram(values, 0.15, 0.45)
    assert torch.allclose(sum(parts), whole)
    assert whole[:HISTOGRAM_BINS].sum() == 6, "values outside fall into the outer bins"
    assert whole[0] == 2
    assert whole[HISTOGRAM_BINS - 1] == 3
    assert whole[HISTOGRAM_BINS].item() == pytest.approx(values.double().sum().item())
    assert whole[HISTOGRAM_BINS + 1].item() == pytest.approx(values.double().square().sum().item())
