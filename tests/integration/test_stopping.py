"""Signals stop all ranks after the same step, with a checkpoint, and the same command goes on to the same end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import Forks
from tests.integration.conftest import ROOT, Run, environment
from tests.integration.test_resume import STEPS, same_end, session, wait_for

Command = Callable[..., list[str]]


@contextlib.contextmanager
def _running(arguments: list[str], folder: Path, until: int) -> Iterator[subprocess.Popen[str]]:
    """A run that has written the checkpoint of step `until`, or a later one."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as run:  # fmt: skip
        wait_for(folder, until, lambda: run.poll() is None)
        yield run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_process(forks: Forks, command: Command, tmp_path: Path, number: signal.Signals) -> None:
    arguments = command(1, "train.checkpoint_steps=2", "train.epochs=400")
    with forks.start(*arguments, cwd=ROOT, env=environment()) as run:
        wait_for(tmp_path / "run", 4, run.is_running)
        os.kill(run.pids[0], number)
        done = run.wait(30)
    assert done.returncode == 75
    told = done.stderr
    assert f"stopped by {number.name} after" in told
    assert "Traceback" not in told
    step = int(told.partition(" after ")[2].split()[0])
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{step:09d}\n"


def _a_rank(launcher: int) -> int:
    """A process that the launcher has begun."""
    parents = {int(stat.parent.name): stat.read_text() for stat in Path("/proc").glob("[0-9]*/stat")}
    return next(pid for pid, stat in parents.items() if int(stat.rpartition(")")[2].split()[1]) == launcher)


def test_ranks_stop_together_and_end_as_if_they_had_not(train: Run, command: Command, tmp_path: Path) -> None:
    """SIGTERM to the launcher, which hands it on; later SIGUSR1 to one rank, and the other hears of it."""
    whole = train(2, name="whole")
    assert whole.returncode == 0, whole.stderr
    for until, number in ((2, signal.SIGTERM), (12, signal.SIGUSR1)):
        arguments = command(2, "train.checkpoint_steps=2", name="parts")
        with _running(arguments, tmp_path / "parts", until) as run:
            os.kill(run.pid if number == signal.SIGTERM else _a_rank(run.pid), number)
            _, told = run.communicate(timeout=60)
        assert run.returncode != 0
        assert f"stopped by {number.name} after" in told
        assert f"of {STEPS} steps" in told
        assert not session(run.pid)
        assert not (tmp_path / "parts" / "backbone.pt").exists()
    rest = train(2, "train.checkpoint_steps=2", name="parts")
    assert rest.returncode == 0, rest.stderr
    assert "resumed at step" in rest.stderr
    same_end(tmp_path, ranks=2)
