"""Torchrun starts ranks anew after one was killed: they go on by themselves, to the bits of a run left alone."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from configs.load import load_config
from tests.integration.conftest import ROOT, environment
from tests.launches import Launch
from tests.ranks import RankPool, ranks_of
from training.checkpoint.manifest import NAME
from training.stopping import Signals
from training.trainer import Trainer

Command = Callable[..., list[str]]
RESUMED = re.compile(r"resumed at step (\d+)")


def _train(group: dist.ProcessGroup, settings: list[str]) -> str:
    return Trainer(load_config(None, settings), ranks_of(group)).run(Signals())


def _settings(arguments: list[str]) -> list[str]:
    return arguments[arguments.index("train_dist.py") + 2 :: 2]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "backbone.pt", weights_only=True)
    return weights


def _wait_for_part(folder: Path) -> None:
    """Until a rank has begun to write a checkpoint, which does not count yet."""
    deadline = time.monotonic() + 60
    while not (folder.is_dir() and any(folder.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_ranks_that_torchrun_starts_anew_go_on_from_their_own_checkpoint(
    ranks: RankPool, command: Command, tmp_path: Path
) -> None:
    """Also with train.resume=false, and with an older run's checkpoint of a later step in the same folder."""
    short = "train.epochs=2"  # 16 steps
    assert ranks.run(2, _train, _settings(command(2, short, name="whole"))) == ["", ""]
    older = (short, "train.stop_after_steps=14", "train.seed=5")
    assert ranks.run(2, _train, _settings(command(2, *older, name="parts"))) == ["", ""]

    mine = (short, "train.resume=false", "train.checkpoint_steps=4", "train.log_steps=1")
    arguments = command(2, *mine, name="parts")
    arguments.insert(arguments.index("train_dist.py"), "--max-restarts=3")
    checkpoints = tmp_path / "parts" / "checkpoints"
    with Launch(arguments, cwd=ROOT, environment=environment()) as run:
        run.until("step 7/", 120)
        killed = run.ranks()[1]
        _wait_for_part(checkpoints / "step_000000008")
        os.kill(killed, signal.SIGKILL)
        assert run.process.wait(120) == 0, run.told
    found = RESUMED.search(run.told)
    assert found, run.told
    assert int(found[1]) in (4, 8), run.told  # the other rank may still have let it count
    assert NAME in os.listdir(checkpoints / "step_000000016")
    whole, parts = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
