"""What a run tells: a progress bar with the time left on terminals, lines elsewhere, events that outlast a resume."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.showing.metrics
from data.contact_sheet import Pixels
from training.showing.metrics import HISTOGRAM_BINS, RunLog, append_line, count_histogram
from training.sinks import Sinks


def _log(output: Path, first_step: int = 0, *, active: bool = True) -> RunLog:
    return RunLog(output, active=active, total_steps=40, first_step=first_step)


def test_a_terminal_shows_progress_with_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        training.showing.metrics, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120)
    )
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
    time.sleep(1 - time.time() % 1)  # files of a second are read in the order of a counter in their names, as text
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_what_cannot_be_written_is_said_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder goes, a full disk stands in for the lines' file, and both come back."""
    log = _log(tmp_path / "run")
    log.scalars(1, {"loss/total": 1.0})
    log._writer.flush()  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        log.scalars(step, {"loss/total": 1.0})
        log.histogram(step, "clusters/margins", torch.zeros(HISTOGRAM_BINS), 0.0, 1.0, (0.0, 0.0))
        with contextlib.suppress(OSError):
            if log._writer is not None:
                log._writer.flush()
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl: cannot write it ([Errno 2] No such file or directory") == 1
    assert told.count("tensorboard: cannot write it ([Errno 2]") <= 1
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    log.scalars(4, {"loss/total": 1.0})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    for step in (5, 6):
        log.scalars(step, {"loss/total": float(step)}, "loss")
    log.close()
    assert "metrics.jsonl: it can be written again" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 6]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")][-2:] == [5, 6]


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    append_line(path, '{"step": 2}')
    append_line(path, '{"step": 3}')
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}', '{"step": 3}']


class _Sinks(Sinks):
    """What is told to other places."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        self.told.append((step, tag))

    def close(self, *, failed: bool = False) -> None:
        self.told.append("failed" if failed else "closed")


def test_other_places_get_scalars_curves_and_how_it_ended_but_no_faces(tmp_path: Path) -> None:
    sinks, picture = _Sinks(), np.zeros((4, 5, 3), dtype=np.uint8)
    log = RunLog(tmp_path, active=True, total_steps=40, first_step=0, sinks=sinks)
    log.scalars(3, {"loss/total": 1.0})
    log.image(3, "clusters/hardest", picture)
    log.image(3, "verification/lfw", picture, elsewhere=True)
    log.close()
    log.close(failed=True)
    with contextlib.suppress(ValueError):
        try:
            raise ValueError
        finally:
            log.close()  # as the trainer does
    assert sinks.told == [(3, {"loss/total": 1.0}), (3, "verification/lfw"), "closed", "failed", "failed"]


def test_lines_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log(tmp_path).say("[Errno 111] [red] [/nothing] \\[")
    assert capsys.readouterr().err == "[Errno 111] [red] [/nothing] \\[\n"
