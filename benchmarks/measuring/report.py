"""Results and their files: figures, and beside them hardware, load, date, versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table


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


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The least and the largest."""
    return f"{digits(min(values))} … {digits(max(values))}"


def publish(
    title: str,
    header: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    about: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    out: Path | None,
    only_in_file: Sequence[str] = (),
) -> None:
    """Print the table and what is said about it; write both to `out` in Markdown, and beside it the rows as JSON.

    texts: cells of each row, as `header` names them; the second column is text. only_in_file: columns that a terminal
    has no room for. The JSON file is `out` with the ending .json: title, about, and rows with every single time.
    """
    shown = [number for number, name in enumerate(header) if name not in only_in_file]
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for number in shown:
        table.add_column(header[number], justify="left" if number == 1 else "right", no_wrap=number <= 1)
    for number, text in enumerate(texts):
        last_of_its_kind = number + 1 == len(texts) or texts[number + 1][0] != text[0]
        table.add_row(*(text[column] for column in shown), end_section=last_of_its_kind)
    console = Console()
    console.print(table)
    for name, value in about.items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if out is None:
        return
    lines = "".join(f"- {name}: {value}\n" for name, value in about.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"# {title}\n\n{lines}\n{markdown_table(header, texts)}", encoding="utf-8")
    data = {"title": title, "about": dict(about), "rows": [dict(row) for row in rows]}
    beside = out.with_suffix(".json")
    beside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written to {out} and {beside}", markup=False, highlight=False, soft_wrap=True)
