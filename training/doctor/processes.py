"""Starts the processes of `probe`, and ends them when they take too long."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.schema import ConfigError
from training.doctor.finding import Finding
from training.doctor.gpus import Gpu, GpuFacts

SECONDS = 45.0
_ROOT = Path(__file__).parents[2]
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")


class Ended(NamedTuple):
    """code: exit code; None: it took too long, and was ended."""

    code: int | None
    out: str
    err: str


def run(commands: Sequence[tuple[Sequence[str], dict[str, str]]], seconds: float) -> list[Ended]:
    """Run commands at the same time, each with its additions to the environment, for so many seconds together."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    path = os.pathsep.join(filter(None, (str(_ROOT), kept.get("PYTHONPATH", ""))))
    started = [
        subprocess.Popen(
            command,
            env={**kept, "PYTHONPATH": path, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, more in commands
    ]
    ends, ended = time.monotonic() + seconds, []
    for process in started:
        try:
            out, err = process.communicate(timeout=max(0.1, ends - time.monotonic()))
            ended.append(Ended(process.returncode, out, err))
        except subprocess.TimeoutExpired:
            process.kill()
            ended.append(Ended(None, *process.communicate()))
    return ended


def _probe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "training.doctor.probe", *arguments]


def gpu_facts(seconds: float = SECONDS) -> GpuFacts:
    """Raises ConfigError when the driver does not answer, or the process that asks it fails."""
    (ended,) = run([(_probe("gpus"), {})], seconds)
    if ended.code is None:
        raise ConfigError(f"GPUs: expected the driver to answer within {seconds:g} s: does nvidia-smi?")
    if ended.code:
        said = last_line(ended.err) or f"exit code {ended.code}"
        raise ConfigError(f"GPUs: the process that looks for them failed: {said}: does nvidia-smi see them?")
    facts = json.loads(ended.out)
    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in facts.pop("gpus"))
    return GpuFacts(gpus=gpus, **{**facts, "architectures": tuple(facts["architectures"])})


def group(*, cuda: bool, processes: int = 2, seconds: float = SECONDS) -> Finding:
    """A process group on this host's loopback that adds up a number, by the code that a training runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = "cuda" if cuda else "cpu"
    commands = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        commands.append((_probe("group", device), {**place, **sizes}))
    return judge_group(run(commands, seconds), "NCCL" if cuda else "gloo", seconds)


def judge_group(ended: Sequence[Ended], backend: str, seconds: float) -> Finding:
    """What became of its processes."""
    name, count = "process group", len(ended)
    if all(one.code == 0 for one in ended):
        return Finding(name, "pass", f"{count} process(es) added up a number by {backend}")
    wrong = next((last_line(one.err) for one in ended if one.code), "")
    text = f"{count} process(es) did not add up a number by {backend} within {seconds:g} s"
    if backend == "NCCL":
        cure = "NCCL_DEBUG=INFO tells more; try NCCL_P2P_DISABLE=1; look at shared memory above"
    else:
        cure = "let processes reach each other on the loopback device; GLOO_SOCKET_IFNAME=lo names it"
    return Finding(name, "fail", f"{text}: {wrong}" if wrong else text, cure)


def last_line(text: str) -> str:
    """The line that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), (lines or [""])[-1])
