"""The entrypoint on one host: signals reach the ranks, and it ends with the ranks' exit code, which torchrun hides."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, call, environment
from tests.launches import Launch

Start = Callable[..., Launch]


@pytest.fixture
def start(command: Callable[..., list[str]]) -> Start:
    """`start(*settings, ranks=…)`: a long training, begun by the entrypoint; a line for each step."""

    def begin(*settings: str, ranks: int = 1) -> Launch:
        arguments = command(ranks, "train.epochs=1000", "train.log_steps=1", *settings)
        arguments = arguments[arguments.index("train_dist.py") + 1 :]
        variables = {"PET_NPROC_PER_NODE": str(ranks)}
        return Launch(["-m", "docker.launch", *arguments], cwd=ROOT, environment={**environment(), **variables})

    return begin


def _launcher(run: Launch) -> int:
    return run.process.pid


def test_a_signal_to_the_entrypoint_or_to_all_saves_and_the_same_command_goes_on(start: Start, tmp_path: Path) -> None:
    with start(ranks=2) as run:
        run.until("step 2/", 60)
        os.kill(_launcher(run), signal.SIGTERM)
        assert run.process.wait(60) == 75, run.told
        assert not run.alive()
    latest = tmp_path / "run/checkpoints/latest"
    step = int(latest.read_text(encoding="utf-8").strip().removeprefix("step_"))
    assert "SIGTERM" in run.told
    with start(ranks=2) as run:
        run.until(f"step {step + 2}/", 60)
        for pid in run.alive():  # as of Slurm's --signal without B:, and of scancel: torchrun and ranks get it too
            os.kill(pid, signal.SIGUSR1)
        assert run.process.wait(60) == 75, run.told
        assert not run.alive()
    assert f"resumed at step {step}" in run.told
    assert int(latest.read_text(encoding="utf-8").strip().removeprefix("step_")) >= step + 2


def test_a_run_that_cannot_begin_ends_with_its_own_code(start: Start) -> None:
    with start("train.precision=fp7") as run:
        assert run.process.wait(60) == 2, run.told
    assert "error: train.precision: " in run.told


def test_the_entrypoint_waits_for_ranks_whose_torchrun_was_killed(start: Start, tmp_path: Path) -> None:
    with start(ranks=2) as run:
        run.until("step 2/", 60)
        ranks = run.ranks()
        (torchrun,) = set(run.alive()) - set(ranks.values()) - {_launcher(run)}
        os.kill(torchrun, signal.SIGKILL)
        assert run.process.wait(60) == 75, run.told
        assert not run.alive()
    assert (tmp_path / "run/checkpoints/latest").read_text(encoding="utf-8").startswith("step_")


def test_a_signal_before_there_is_a_run_ends_at_once() -> None:
    environ = {**environment(), "PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    with Launch(["-m", "docker.launch", "--config", "none.yaml"], cwd=ROOT, environment=environ) as run:
        run.until("waiting for 127.0.0.1:9: Connection refused", 20)
        os.kill(_launcher(run), signal.SIGTERM)
        assert run.process.wait(20) == 128 + signal.SIGTERM


def test_dry_run_prints_the_command_and_starts_nothing() -> None:
    done = call("-m", "docker.launch", "--dry-run", "--config", "a file.yaml")
    assert done.returncode == 0
    assert done.stdout.endswith(f"{ROOT}/docker/rank.py --config 'a file.yaml'\n")
    assert " -m torch.distributed.run --standalone --nproc-per-node=1 " in done.stdout
    assert not done.stderr


def test_without_arguments_it_says_what_it_takes() -> None:
    done = call("-m", "docker.launch")
    assert done.returncode == 2
    assert "Arguments are those of train_dist.py" in done.stdout
