"""HEALTHCHECK of the image: whether the training that runs in this container still tells of steps.

Every `train.log_steps` steps rank 0 adds a line to `metrics.jsonl` in `train.output`, which all hosts share. Healthy: a
line that is younger than CLUSTERFACE_SILENCE_S seconds (1800), or a container that has not run for longer. An
evaluation or an epoch's start that takes longer than that looks the same as a run that hangs: then raise it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_SILENCE_S = 1800.0


def launched(processes: Path = Path("/proc")) -> tuple[list[str], float]:
    """Arguments of the training that runs here, and its age in seconds. Raises LookupError when none does."""
    for folder in sorted(processes.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            started = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
        except (OSError, IndexError):
            continue  # it has just ended
        if words[1:3] == ["-m", "docker.launch"]:
            uptime = float((processes / "uptime").read_text().split()[0])
            return words[3:], uptime - started / os.sysconf("SC_CLK_TCK")
    raise LookupError("expected `python -m docker.launch` to run here, found no such process")


def output_folder(arguments: Sequence[str]) -> Path:
    """`train.output` of the run that these arguments of train_dist.py begin."""
    from configs.load import load_config  # noqa: PLC0415  the check of a host without a run needs none of it

    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    known, _ = parser.parse_known_args(arguments)
    return Path(load_config(known.config, known.set).train.output)


def silence(folder: Path, age: float) -> float:
    """Seconds since the run's last line, or since the container began, whichever is less."""
    try:
        return min(age, time.time() - (folder / "metrics.jsonl").stat().st_mtime)
    except OSError:
        return age


def main() -> int:
    """0: healthy, 1: not; a line says why."""
    try:
        arguments, age = launched()
    except LookupError as error:
        print(error)
        return 1
    wanted = os.environ.get("CLUSTERFACE_SILENCE_S", str(_SILENCE_S))
    try:
        allowed = float(wanted)
    except ValueError:
        allowed = math.nan
    if math.isnan(allowed):
        print(f"CLUSTERFACE_SILENCE_S: expected seconds, got {wanted!r}: correct it")
        return 1
    folder = output_folder(arguments)
    quiet = silence(folder, age)
    print(f"{folder / 'metrics.jsonl'}: last told {quiet:.0f} s ago, {allowed:.0f} s are let pass")
    return int(quiet > allowed)


if __name__ == "__main__":
    sys.exit(main())
