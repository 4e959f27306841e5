"""Memory that a step of one head needs at its peak, measured in a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.heads.arms import DENSE, OURS, STYLE, Arm, Problem
from benchmarks.heads.rivals import RIVALS
from benchmarks.measuring.memory import peak_extra
from configs.schema import HeadConfig, TrainConfig
from training.distributed import open_ranks


def extra_in_own_process(
    arm: Arm, classes: int, *, batch: int, dim: int, device: str, threads: int, seed: int, config: HeadConfig
) -> int | None:
    """Bytes beyond weights, momentum and batch, of a head's second step; None where the system does not tell.

    Raises RuntimeError when the process fails.
    """
    values = {"kind": arm.kind, "rate": arm.rate, "classes": classes, "batch": batch, "dim": dim}
    values |= {"device": device, "threads": threads, "seed": seed}
    values |= {"impl": config.impl, "centre-dtype": config.centre_dtype}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.heads.arm_memory", *(f"--{name}={value}" for name, value in values.items())],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # see benchmarks.measuring.memory
    )
    if child.returncode:
        raise RuntimeError(f"memory of {arm} at {classes} classes: exit code {child.returncode}")
    return int(child.stdout) if child.stdout.strip().isdigit() else None


def main() -> None:
    """Print the bytes, or a word where they are not known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads.arm_memory", description=__doc__)
    parser.add_argument("--kind", choices=(STYLE, DENSE, OURS, *RIVALS), required=True)
    parser.add_argument("--rate", type=float, required=True)
    for name in ("device", "impl", "centre-dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("classes", "batch", "dim", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    arm = Arm(args.kind, args.rate)
    config = HeadConfig(impl=args.impl, centre_dtype=args.centre_dtype)
    with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
        problem = Problem(args.classes, batch=args.batch, dim=args.dim, seed=args.seed, config=config, ranks=ranks)
        problem.step(arm, 0)  # makes the momentum, loads what is loaded at first use
        extra = peak_extra(lambda: problem.step(arm, 1) and None, ranks.device)
    print("unknown" if extra is None else extra)


if __name__ == "__main__":
    main()
