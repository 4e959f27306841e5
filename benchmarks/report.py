"""What a benchmark result must say beside its figures: hardware, load, date, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def facts(device: torch.device, module: str, arguments: Sequence[str]) -> dict[str, str]:
    """Lines `name: value` for a result. module: as in `python -m module`."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": _hardware(device),
        "load before": _load(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} "
        f"{platform.release().split('-')[0]} {platform.machine()}",
        "commit": _commit(),
        "command": f"`python -m {' '.join([module, *arguments])}`",
    }


def _hardware(device: torch.device) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    simd, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    cpu = f"{_cpu_name()}, {cores} cores, {simd}, {threads} thread(s) used"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor() or "unknown CPU")
    if "cpu family" in fields and "model" in fields:  # virtual machines may hide the rest of the name
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _load() -> str:
    try:
        return "{:.2f} over 1 minute, {:.2f} over 5".format(*os.getloadavg()[:2])
    except OSError:
        return "unknown"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../partial_fc", "../benchmarks")
        return git("rev-parse", "--short=10", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """All columns to the right."""
    rule = ["---:"] * len(header)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, rule, *rows))
