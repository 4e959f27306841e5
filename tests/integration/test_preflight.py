"""Before a run: the doctor on a real set, and faults of host and network that train_dist.py itself meets: one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forks
from tests.integration.conftest import ROOT, Run, call, environment

_SECONDS = 120


Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def program(forks: Forks) -> Program:
    """`program(arguments, NAME=value…)`: with more in its environment."""

    def run(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return forks.run(*arguments, cwd=ROOT, env={**environment(), **more}, timeout=_SECONDS)

    return run


def _errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


Doctor = Callable[..., "tuple[int, dict[str, Any]]"]


@pytest.fixture
def doctor(command: Callable[..., list[str]], program: Program) -> Doctor:
    """`doctor(ranks, *settings)`: exit code, and what was found."""

    def run(ranks: int, *settings: str, more: tuple[str, ...] = (), **named: Any) -> tuple[int, dict[str, Any]]:
        parts = command(1, *settings, **named)[1:]
        done = program(["-m", "training", "doctor", "--json", "--ranks", str(ranks), *more, *parts])
        assert not _errors(done)
        return done.returncode, json.loads(done.stdout)

    return run


def _states(found: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["state"] for finding in found["findings"]}


def test_a_set_that_is_well_and_its_checkpoint(doctor: Doctor, train: Run, tmp_path: Path) -> None:
    settings = ("eval.sets=[verification.bin]", "train.checkpoint_steps=5", "train.keep_checkpoints=20")
    code, found = doctor(1, *settings)
    assert (code, found["failed"]) == (0, 0), found
    states = _states(found)
    assert {"process group", "rendezvous port", "output", "disk space", "images", "epoch", "set verification"} <= {
        *states
    }
    assert {*states.values()} <= {"pass", "warn"}
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"

    done = train(1, *settings)
    assert done.returncode == 0, done.stderr
    folders = [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()]
    largest = max(sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders)
    counted = found["checkpoint_bytes"]
    assert 0.9 * counted < largest < counted + 64_000, "headers and random states come on top of what is counted"


def test_a_broken_run_in_one_report(doctor: Doctor, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "broken.bin").write_bytes(b"no pickle")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, found = doctor(
            64,
            f"train.output={tmp_path / 'file' / 'run'}",
            f"eval.sets=[{tmp_path / 'broken.bin'},{packed / 'none.bin'}]",
            "train.device=cuda",
            more=("--rdzv", f"localhost:{taken.getsockname()[1]}"),
        )
    assert code == 1
    failed = {finding["name"] for finding in found["findings"] if finding["state"] == "fail"}
    assert {"GPUs", "rendezvous port", "output", "epoch", "set broken", "set none"} <= failed
    for finding in found["findings"]:
        assert "\n" not in finding["text"]


def test_people_read_lines(program: Program, command: Callable[..., list[str]]) -> None:
    done = program(["-m", "training", "doctor", *command(1)[1:]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass  records: 192 images of 24 identities" in done.stdout
    assert "a checkpoint, of all ranks (disk)" in done.stdout


def test_training_meets_a_port_in_use(program: Program, command: Callable[..., list[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = program(command(1), **place)
    assert done.returncode == 2
    (line,) = _errors(done)
    assert f"MASTER_PORT {port}): the port is in use" in line


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, "abc"),
    ],
)
def test_training_in_a_wrong_environment(
    program: Program, command: Callable[..., list[str]], place: dict[str, str], said: str
) -> None:
    done = program(command(1), **place)
    assert done.returncode == 2
    (line,) = _errors(done)
    assert said in line


def test_one_rank_needs_nothing_of_its_launcher(program: Program, command: Callable[..., list[str]]) -> None:
    """Torchrun's store, which may be gone by the time of the last checkpoint: here nobody listens at its address."""
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = program(command(1, "train.stop_after_steps=1"), RANK="0", WORLD_SIZE="1", **torchrun)
    assert done.returncode == 0, done.stderr


def test_help() -> None:
    done = call("-m", "training", "--help")
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert os.linesep in done.stdout
