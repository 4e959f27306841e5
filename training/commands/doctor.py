"""`python -m training doctor`: what would keep a run from starting, or from ending, found in seconds."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.load import load_config
from data.commands.arguments import whole
from training.doctor.checks import Doctor
from training.doctor.finding import Finding, examine, size_text
from training.doctor.memory import Plan
from training.doctor.network import endpoint

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="look at host, network, disk and data before a run",
        description="Looks at everything that a run with these settings needs of this host. Trains nothing, and leaves "
        "nothing behind. Exit code 0: nothing fails, warnings there may be; 1: something fails; 2: wrong arguments or "
        "settings.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe, one of configs/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="as of train_dist.py; many times"
    )
    parser.add_argument(
        "--ranks", type=whole(1), default=0, metavar="N", help="of all hosts; default WORLD_SIZE, or one for each GPU"
    )
    parser.add_argument("--hosts", type=whole(1), default=1, metavar="N", help="that share the ranks, default 1")
    parser.add_argument(
        "--rdzv",
        default="",
        metavar="HOST:PORT",
        help="torchrun's --rdzv_endpoint; default MASTER_ADDR and MASTER_PORT, or 127.0.0.1:29500",
    )
    parser.add_argument("--json", action="store_true", help="everything found, to standard output, for machines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    """0: nothing fails, 1: something does. Raises ConfigError for wrong settings."""
    config = load_config(args.config, args.set)
    world = os.environ.get("WORLD_SIZE", "")
    ranks = args.ranks or (int(world) if world.isascii() and world.isdigit() else 0)
    doctor = Doctor(config, endpoint(args.rdzv), ranks=ranks, hosts=args.hosts)
    with console.status("looking"):  # nothing, but on terminals
        findings = examine(doctor.checks())
    failed = sum(finding.state == "fail" for finding in findings)
    plan = doctor.plan.made
    if args.json:
        rows = [] if plan is None else [asdict(row) for row in plan.rows]
        found = {"failed": failed, "findings": [asdict(finding) for finding in findings], "memory": rows}
        found["checkpoint_bytes"] = None if plan is None else plan.checkpoint
        print(json.dumps(found, indent=1))
    else:
        _tell(findings, plan)
    return int(failed > 0)


def _tell(findings: Sequence[Finding], plan: Plan | None) -> None:
    screen = Console()
    if not screen.is_terminal:
        for finding in findings:
            print(f"{finding.state}  {finding.name}: {finding.text}" + (f"; {finding.cure}" if finding.cure else ""))
        for name, size, note in _rows(plan):
            print(f"      {size:>12}  {name}{note}")
        return
    table = Table("", "check", "found", "cure")
    for finding in findings:
        state = f"[{_COLOURS[finding.state]}]{finding.state}"
        table.add_row(state, *map(escape, (finding.name, finding.text, finding.cure)))
    screen.print(table)
    if plan is not None:
        sizes = Table("memory of a rank", "bytes", title="what is counted; activations are not")
        sizes.columns[1].justify = "right"
        for name, size, note in _rows(plan):
            sizes.add_row(name + note, size)
        screen.print(sizes)


def _rows(plan: Plan | None) -> list[tuple[str, str, str]]:
    """Name, size, and when and where."""
    if plan is None:
        return []
    rows = []
    for row in plan.rows:
        notes = ["host"] * (row.place == "host") + ["at a time"] * row.at_a_time
        rows.append((row.name, size_text(row.bytes), f" ({', '.join(notes)})" if notes else ""))
    return [*rows, ("a checkpoint, of all ranks", size_text(plan.checkpoint), " (disk)")]
