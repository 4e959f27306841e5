"""A small packed set that all integration tests share, and a way to run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train_dist
from tests.attack_cases import Say
from tests.forked import Forks

ROOT = Path(__file__).parents[2]
IDENTITIES, IMAGES = 24, 8

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """Ours, without what a launcher of these tests may have set, and without GPUs: runs are the same anywhere."""
    kept = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def call(*command: str, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `python <command>` and capture what it prints."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 identities, 8 images each, and a verification set of other identities."""
    folder = tmp_path_factory.mktemp("packed") / "set"
    done = call(
        *("-m", "data", "pack", "synthetic", "--out", str(folder), "--workers", "1", "--seed", "3"),
        *("--identities", str(IDENTITIES), "--images-per-identity", str(IMAGES)),
        *("--verification-identities", "8", "--pairs", "40"),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def command(packed: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`command(ranks, *settings, data=…, name=…)`: arguments of a tiny run of train_dist.py, written to `name`."""

    def build(ranks: int, *settings: str, data: Path = packed, name: str = "run") -> list[str]:
        tiny = [
            "model.backbone=small",
            "model.embedding_size=16",
            "head.scale=16",
            "head.margin=0.3",
            "clustering.margin_low=0.15",
            "clustering.margin_high=0.45",
            "clustering.warmup_fraction=0.25",
            "clustering.ramp_fraction=0.25",
            "clustering.block=16",
            "optim.lr=0.02",
            "optim.reference_batch=0",
            "train.device=cpu",
            "train.precision=fp32",
            "train.epochs=4",
            f"train.batch_size={24 // ranks}",
            "train.log_steps=4",
            "train.cpu_threads=1",
            "data.threads=1",
            "data.backend=cpu",
            f"data.path={data}",
            f"train.output={tmp_path / name}",
        ]
        launcher = ["train_dist.py"]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train_dist.py"]
        return [*launcher, *(part for setting in [*tiny, *settings] for part in ("--set", setting))]

    return build


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Begins `python …` at once: `forks.run(*command, cwd=ROOT, env=environment())` is what `call` does."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture
def train(command: Callable[..., list[str]], forks: Forks) -> Run:
    """The same run, to its end, each rank a process; without torchrun, whose part is tested with `command`."""

    def run(ranks: int, *settings: str, **named: Any) -> subprocess.CompletedProcess[str]:
        whole = command(ranks, *settings, **named)
        return forks.run(*whole[whole.index("train_dist.py") :], cwd=ROOT, env=environment(), ranks=ranks)

    return run


@pytest.fixture
def train_here(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Run:
    """The same run on one rank in this process: spares the seconds of starting one."""

    def run(*settings: str, **named: Any) -> subprocess.CompletedProcess[str]:
        threads = torch.get_num_threads()
        arguments = command(1, *settings, **named)[1:]
        capsys.readouterr()
        try:
            code = train_dist.main(arguments)
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()  # after an error the command line leaves that to the end of its process
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What must not be there in the end."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Say:
    """The one line that was printed to stderr, which starts as an error does."""

    def line() -> str:
        (text,) = capsys.readouterr().err.splitlines()
        assert text.startswith("error: ")
        assert text.isprintable()
        return text

    return line
