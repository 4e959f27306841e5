"""SIGTERM at any moment: in start-up, in an evaluation, while a checkpoint is written, in a refresh."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.forked import Forks, Started
from tests.integration.conftest import ROOT, Run, environment

Command = Callable[..., list[str]]
Weights = dict[str, torch.Tensor]
SETTINGS = ("train.epochs=2", "train.checkpoint_steps=2", "eval.sets=[verification.bin]", "eval.every_epochs=9")
_KEPT: Weights = {}

_SLOW = """
import signal, sys, time
import training.checkpoint.saver as saver
import training.trainer as trainer
import train_dist
from training.step import TrainStep

moment, *arguments = sys.argv[1:]


def say_and_wait(work):
    times = iter([1])

    def slow(*positional, **named):
        print("NOW", flush=True)
        time.sleep(next(times, 0))
        return work(*positional, **named)

    return slow


if moment == "start-up":
    trainer.loader_of = say_and_wait(trainer.loader_of)
elif moment == "evaluation":
    import evaluation.embed.embed as embed
    embed._pixels = say_and_wait(embed._pixels)
elif moment == "saving":
    saver.write = say_and_wait(saver.write)
elif moment == "refresh":
    from clustering.service.refresh import Refresh
    Refresh.advance = say_and_wait(Refresh.advance)
sys.exit(train_dist.main(arguments))
"""
"""Makes the moment long, and says when it has come."""


@pytest.fixture
def undisturbed(train_here: Run, tmp_path: Path) -> Weights:
    """What a run that is let alone ends with."""
    if not _KEPT:
        whole = train_here(*SETTINGS, name="whole")
        assert whole.returncode == 0, whole.stderr
        _KEPT.update(torch.load(tmp_path / "whole" / "backbone.pt", weights_only=True))
    return _KEPT


@pytest.mark.parametrize(("moment", "steps"), [("start-up", "0"), ("evaluation", "0"), ("saving", ""), ("refresh", "")])
def test_a_checkpoint_of_the_step_it_came_in(
    train_here: Run, forks: Forks, command: Command, tmp_path: Path, undisturbed: Weights, moment: str, steps: str
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(_SLOW)
    arguments = command(1, *SETTINGS)[1:]
    with forks.start(str(slow), moment, *arguments, cwd=ROOT, env=environment()) as run:
        _wait_for_now(run)
        os.kill(run.pids[0], signal.SIGTERM)
        done = run.wait(30)
    told = done.stderr
    assert done.returncode == 75, told
    step = told.partition("stopped by SIGTERM after ")[2].split()[0]
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert step == steps if steps else int(step) > 0
    assert latest.read_text() == f"step_{int(step):09d}\n" if int(step) else not latest.exists()
    rest = train_here(*SETTINGS)
    assert rest.returncode == 0, rest.stderr
    one = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert all(torch.equal(one[key], undisturbed[key]) for key in one)
    evaluated = (tmp_path / "run" / "verification.jsonl").read_text().splitlines()
    assert len(evaluated) == 2, "an evaluation that was broken off is made anew, and none twice"


def _wait_for_now(run: Started) -> None:
    deadline = time.monotonic() + 60
    while "NOW\n" not in run.printed("out"):
        assert run.is_running(), run.printed("err")
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)
