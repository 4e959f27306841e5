"""Kill after step k, resume, and end with the same weights bit for bit as the run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.integration.conftest import ROOT, Run, environment
from training.checkpoint import Saved, place_of

STEPS = 32  # 4 epochs x 8 steps


def _final(folder: Path) -> Saved:
    return Saved(place_of(str(folder / "checkpoints")), f"step_{STEPS:09d}")


def test_stopped_and_resumed_equals_never_stopped(train: Run, tmp_path: Path) -> None:
    """Stopped twice in the middle of an epoch, at 19 also in the middle of a refresh with published clusters in use."""
    whole = train(1, name="whole")
    assert whole.returncode == 0, whole.stderr
    for stop in (11, 19):
        part = train(1, f"train.stop_after_steps={stop}", name="parts")
        assert part.returncode == 0, part.stderr
        assert f"stopped after {stop} of {STEPS} steps" in part.stderr
    rest = train(1, name="parts")
    assert rest.returncode == 0, rest.stderr
    assert "resumed at step 19" in rest.stderr
    same_end(tmp_path, ranks=1)


def same_end(folder: Path, *, ranks: int) -> None:
    first, second = _final(folder / "whole"), _final(folder / "parts")
    assert first.manifest.world_size == second.manifest.world_size == ranks
    assert first.names == second.names
    for name in first.names:
        assert torch.equal(first.read(name), second.read(name)), name
    for values in (first.values, second.values):
        for setting in ("output", "stop_after_steps", "checkpoint_steps"):
            del values["settings"]["train"][setting]
    assert first.values == second.values
    version = first.values["state"]["clusters"]["version"]
    assert version >= 2, "the run must have used clusters, or this test shows little"


def test_killed_and_resumed_equals_never_stopped(train: Run, command: Callable[..., list[str]], tmp_path: Path) -> None:
    """SIGKILL to all ranks at some moment after step 18; the steps since the checkpoint are done again."""
    whole = train(2, name="whole")
    assert whole.returncode == 0, whole.stderr
    setting = "train.checkpoint_steps=3"
    with subprocess.Popen(
        [sys.executable, *command(2, setting, name="parts")],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        wait_for(tmp_path / "parts", 18, lambda: run.poll() is None)
        for pid in session(run.pid):
            os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "parts" / "backbone.pt").exists(), "killed before its end"
    rest = train(2, setting, name="parts")
    assert rest.returncode == 0, rest.stderr
    assert "resumed at step" in rest.stderr
    same_end(tmp_path, ranks=2)


def wait_for(folder: Path, step: int, is_running: Callable[[], bool]) -> None:
    """Until the run that writes to this folder has a checkpoint of that step, or of a later one."""
    deadline = time.monotonic() + 120
    latest = folder / "checkpoints" / "latest"
    while not latest.is_file() or latest.read_text().strip() < f"step_{step:09d}":
        assert is_running()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def session(leader: int) -> list[int]:
    """Processes of the session that `leader` began: the launcher, and its ranks, which have groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == leader:
            found.append(int(stat.parent.name))
    return found


def test_a_run_with_no_step_left_to_do_saves_no_checkpoint_again(train: Run, tmp_path: Path) -> None:
    assert train(1, "train.stop_after_steps=3").returncode == 0
    folder = tmp_path / "run" / "checkpoints"
    written = [(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("step_*/*"))]
    assert written
    again = train(1, "train.stop_after_steps=3")
    assert again.returncode == 0, again.stderr
    assert [(path, path.stat().st_mtime_ns) for path, _ in written] == written


def test_other_settings_do_not_continue_a_run(train: Run) -> None:
    assert train(1, "train.stop_after_steps=3").returncode == 0
    other = train(1, "optim.lr=0.5")
    assert other.returncode == 2
    assert "was written with optim.lr = 0.02, this run has 0.5" in other.stderr
