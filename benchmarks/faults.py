"""What does a training say, and after how many seconds, when ranks, launchers or the network fail under it?

Two ranks on synthetic faces, on one host under torchrun, and on two hosts where root may make network namespaces. Each
fault is one run of its own; nothing here is faster or slower than anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measuring.report import digits, facts, publish
from data.__main__ import main as data
from data.commands.arguments import whole
from tests.launches import Launch
from tests.namespaces import INTERFACE, TwoHosts, launcher, why_not

_TITLE = "Faults: what is said, and when"
_HEADER = ("fault", "what is said", "said after s", "ranks gone after s", "launchers gone after s")
_ROOT = Path(__file__).parents[1]
_SETTINGS = (
    *(
        "model.backbone=small",
        "model.embedding_size=16",
        "train.device=cpu",
        "train.precision=fp32",
        "train.epochs=4000",
    ),
    *("train.batch_size=12", "train.log_steps=4", "train.cpu_threads=1", "train.checkpoint_steps=1000000"),
    *("clustering.enabled=false", "data.threads=1", "data.backend=cpu"),
)
_STARTED = "step 8/"
_GIVE_UP_S = 120.0


class Seen(NamedTuple):
    """Seconds are from the fault on; None: not within two minutes."""

    fault: str
    said: str
    said_s: float | None
    ranks_s: float | None
    launchers_s: float | None


def _command(folder: Path, timeout: int, head: Sequence[str]) -> list[str]:
    settings = (*_SETTINGS, f"train.timeout={timeout}", f"data.path={folder / 'set'}", f"train.output={folder / 'run'}",
                "train.resume=false")  # fmt: skip
    return [*head, "train_dist.py", *(part for setting in settings for part in ("--set", setting))]


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def _watch(fault: str, runs: Sequence[Launch], begin: float, done: Callable[[], bool]) -> Seen:
    """Wait for all processes to end, or for `done`."""
    ranks_s = launchers_s = None
    while time.monotonic() - begin < _GIVE_UP_S and launchers_s is None and not done():
        now = time.monotonic() - begin
        alive = any(run.alive() for run in runs)
        ranks_s = ranks_s if ranks_s is not None or any(run.ranks() for run in runs) else now
        launchers_s = None if alive else now
        time.sleep(0.1)
    said = [(t - begin, line) for run in runs for t, line in run.lines if t >= begin and _is_ours(line)]
    first = min(said, default=(None, "nothing"))
    return Seen(fault, " / ".join(line for _, line in sorted(said)) or "nothing", first[0], ranks_s, launchers_s)


def _is_ours(line: str) -> bool:
    return line.startswith(("error: ", "stopped by ", "WARNING training.monitor"))


def _one_host(fault: str, folder: Path, timeout: int, strike: Callable[[Launch], object]) -> Seen:
    head = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    with Launch(_command(folder, timeout, head), cwd=_ROOT, environment=_environment()) as run:
        run.until(_STARTED, _GIVE_UP_S)
        begin = time.monotonic()
        strike(run)
        return _watch(fault, [run], begin, lambda: False)


def _two_hosts(folder: Path, timeout: int, seconds: float) -> Seen:
    """seconds: after which the network heals; 0: it does not."""
    environment = _environment(GLOO_SOCKET_IFNAME=INTERFACE)
    with ExitStack() as stack:
        hosts = stack.enter_context(TwoHosts())
        runs = [
            stack.enter_context(
                Launch(
                    _command(folder, timeout, launcher(host)),
                    cwd=_ROOT,
                    environment=environment,
                    prefix=hosts.prefix(host),
                )
            )
            for host in range(2)
        ]
        runs[0].until(_STARTED, _GIVE_UP_S)
        begin = time.monotonic()
        hosts.cut()
        if not seconds:
            return _watch("network cut", runs, begin, lambda: False)
        time.sleep(seconds)
        before = len(runs[0].lines)
        hosts.join()
        healed = time.monotonic()
        fault = f"network cut for {seconds:g} s"
        seen = _watch(fault, runs, begin, lambda: any("img/s" in line for _, line in runs[0].lines[before:]))
        if seen.launchers_s is None:
            goes_on = f"training goes on {time.monotonic() - healed:.1f} s after the network does"
            seen = seen._replace(said=goes_on if seen.said == "nothing" else f"{goes_on} / {seen.said}")
        return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--timeout", type=whole(5), default=20, help="train.timeout, default 20 seconds")
    parser.add_argument(
        "--cuts", type=float, nargs="*", default=[2, 5, 12], help="seconds of short cuts, default 2 5 12"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(arguments)
    about = facts(torch.device("cpu"), "benchmarks.faults", arguments)
    about["train.timeout"] = f"{args.timeout} s"
    strikes: dict[str, Callable[[Launch], object]] = {
        "SIGSTOP of rank 1": lambda run: os.kill(run.ranks()[1], signal.SIGSTOP),
        "SIGKILL of rank 1": lambda run: os.kill(run.ranks()[1], signal.SIGKILL),
        "SIGKILL of torchrun": lambda run: os.kill(run.process.pid, signal.SIGKILL),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = ("--identities", "24", "--images-per-identity", "8")
        data(["pack", "synthetic", "--out", str(folder / "set"), "--workers", "1", "--seed", "3", *size])
        seen = [_one_host(fault, folder, args.timeout, strike) for fault, strike in strikes.items()]
        if reason := why_not():
            about["left out"] = f"two hosts: {reason}"
        else:
            seen += [_two_hosts(folder, args.timeout, seconds) for seconds in (0.0, *args.cuts)]
    texts = [(s.fault, s.said.replace("|", "/"), *map(_seconds, (s.said_s, s.ranks_s, s.launchers_s))) for s in seen]
    publish(
        _TITLE, _HEADER, texts, about=about, rows=[s._asdict() for s in seen], out=args.out, only_in_file=_HEADER[1:2]
    )
    return 0


def _seconds(value: float | None) -> str:
    return "" if value is None else digits(value)


if __name__ == "__main__":
    sys.exit(main())
