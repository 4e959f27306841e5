"""`python -m data hash` and `check`: is a copy of a set what was copied."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data.checking.checksums import NAME, check_hashes, files_of, write_hashes
from data.commands.arguments import CORES, progress_on, whole


def add(commands: Any) -> None:
    """Register both commands."""
    for name, run, about in (
        ("hash", _hash, f"write {NAME}: SHA-256 of a set's files and of each 64 MiB of them"),
        ("check", _check, f"compare a set's files with {NAME}; exit code 1 where they differ"),
    ):
        parser = commands.add_parser(name, help=about)
        parser.add_argument("folder", type=Path)
        parser.add_argument("--threads", type=whole(1), default=CORES, help=f"that hash, default {CORES} here")
        parser.add_argument("--json", action="store_true", help="the result to standard output, for machines")
        parser.set_defaults(run=run)


def _hash(args: argparse.Namespace, console: Console) -> int:
    with progress_on(console, counted=False) as bars:
        task = bars.add_task("bytes", total=sum(path.stat().st_size for path in files_of(args.folder)))
        content = write_hashes(args.folder, threads=args.threads, progress=lambda read: bars.advance(task, read))
    if args.json:
        print(json.dumps(content, indent=1))
    else:
        for name, entry in content["files"].items():
            print(f"{entry['sha256']}  {name}")
        print(f"written to {args.folder / NAME}")
    return 0


def _check(args: argparse.Namespace, console: Console) -> int:
    with progress_on(console, counted=False) as bars:
        task = bars.add_task("bytes", total=sum(path.stat().st_size for path in files_of(args.folder)))
        faults = check_hashes(args.folder, threads=args.threads, progress=lambda read: bars.advance(task, read))
    if args.json:
        print(json.dumps({"ok": not faults, "faults": [asdict(fault) for fault in faults]}, indent=1))
    elif faults:
        for fault in faults:
            print(fault.line())
    else:
        print(f"{args.folder}: all files are as {NAME} says")
    return int(bool(faults))
