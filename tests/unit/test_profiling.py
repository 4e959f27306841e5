"""A trace holds the steps that were asked for, and whatever fails in it is one line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import training.showing.profiling
from configs.schema import ProfileConfig
from training.showing.metrics import RunLog
from training.showing.profiling import StepProfiler
from training.showing.timing import Stopwatch


def _ranks(rank: int = 0) -> Any:
    return SimpleNamespace(rank=rank, is_main=rank == 0, device=torch.device("cpu"))


def _run(output: Path, *, first: int = 0, last: int = 12, rank: int = 0, **settings: Any) -> None:
    """Steps `first` + 1 to `last` of a run that does little."""
    log = RunLog(output, active=rank == 0, total_steps=40, first_step=first)
    profiler = StepProfiler(ProfileConfig(**settings), _ranks(rank), output)
    watch = Stopwatch(torch.device("cpu"), "backbone")
    for step in range(first + 1, last + 1):
        with watch:
            torch.ones(step, 3).sum()
        profiler.after_step(step, log)
    profiler.close(last, log)
    log.close()


def _trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def _regions(path: Path, name: str) -> int:
    found = [event for event in _trace(path) if event.get("name") == name and event.get("cat") == "user_annotation"]
    return len(found)


@pytest.mark.parametrize(("after", "steps", "first"), [(2, 1, 0), (3, 4, 0), (5, 2, 30)])
def test_the_steps_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: int, steps: int, first: int
) -> None:
    """Counted from where this process begins, and named by the run's own numbers."""
    _run(tmp_path, first=first, last=first + 10, after=after, steps=steps)
    path = tmp_path / "profile" / f"steps_{first + after + 1}-{first + after + steps}_rank0.json.gz"
    assert list((tmp_path / "profile").iterdir()) == [path]
    names = [event.get("name", "") for event in _trace(path)]
    assert len({name for name in names if re.fullmatch(r"ProfilerStep#\d+", name)}) == steps
    assert _regions(path, "backbone") == steps
    assert "aten::sum" in names
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert f"steps {first + after + 1} to {first + after + steps}" in line


def test_none_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path)
    _run(tmp_path, rank=1, steps=2, after=2)
    assert not (tmp_path / "profile").exists()
    assert capsys.readouterr().err == ""


def test_all_ranks(tmp_path: Path) -> None:
    for rank in (0, 1):
        _run(tmp_path, rank=rank, steps=2, after=2, all_ranks=True)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "steps_3-4_rank0.json.gz",
        "steps_3-4_rank1.json.gz",
    ]


def test_a_run_that_ends_amid_it_keeps_what_there_is(tmp_path: Path) -> None:
    _run(tmp_path, last=7, after=5, steps=10)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_6-7_rank0.json.gz"
    assert _regions(path, "backbone") == 2


@pytest.mark.parametrize("last", [1, 4, 5])
def test_a_run_that_ends_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], last: int) -> None:
    _run(tmp_path, last=last, after=5, steps=10)
    assert not (tmp_path / "profile").exists()
    assert "no profile: the run ended before profile.after = 5 steps were done" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file")
    _run(tmp_path, after=2, steps=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'profile'}: no profile (")
    assert line.endswith("training goes on")


def test_a_profiler_that_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED")

    monkeypatch.setattr(training.showing.profiling, "profile", refuse)
    _run(tmp_path, after=2, steps=2)
    assert "no profile (CUPTI_ERROR_MULTIPLE" in capsys.readouterr().err
