"""`python -m training checkpoint`: look into checkpoints, verify, export, cut anew for other ranks."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from data.commands.arguments import Parser, whole
from training.checkpoint import CheckpointError, DamagedError, Saved
from training.checkpoint.manifest import Manifest
from training.checkpoint.tools import (
    checkpoints_at,
    damage,
    export_backbone,
    export_centres,
    newest_at,
    reshard,
)
from training.run_state import is_cut

_WHERE = "output of a run, its folder of checkpoints, or one of them (step_…); a path, or an address of a store"


def add(commands: Any) -> None:
    """Adds the subcommand to a parser's."""
    parser = commands.add_parser("checkpoint", help="inspect, verify, export and reshard checkpoints")
    what = parser.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)

    inspect = what.add_parser("inspect", help="what is in a checkpoint: steps, ranks, settings, tensors")
    inspect.add_argument("where", metavar="PATH", help=_WHERE)
    inspect.add_argument("--json", action="store_true", help="for machines")
    inspect.set_defaults(run=_inspect)

    verify = what.add_parser("verify", help="read all of it, and compare every block with its hash")
    verify.add_argument("where", metavar="PATH", help=_WHERE)
    verify.set_defaults(run=_verify)

    export = what.add_parser("export", help="write weights alone, whatever ranks saved them")
    export.add_argument("where", metavar="PATH", help=_WHERE)
    export.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="….pt, ….safetensors, centres also ….npy"
    )
    export.add_argument("--what", choices=("backbone", "centres"), default="backbone")
    export.set_defaults(run=_export)

    anew = what.add_parser("reshard", help="write it as another number of ranks would have (runs do not need it)")
    anew.add_argument("where", metavar="PATH", help=_WHERE)
    anew.add_argument("--ranks", type=whole(1), required=True, metavar="N")
    anew.add_argument("--out", required=True, metavar="FOLDER", help="a folder of checkpoints, or an address")
    anew.set_defaults(run=_reshard)


def _inspect(args: argparse.Namespace, console: Console) -> int:
    found, names = checkpoints_at(args.where)
    shown = []
    for name in names:
        try:
            shown.append(_facts(Saved(found.place, name)))
        except DamagedError as error:
            shown.append({"checkpoint": name, "damaged": str(error)})
    newest = newest_at(args.where)
    if args.json:
        tensors = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "pieces": len(entry.pieces)}
            for name, entry in newest.manifest.tensors.items()
        }
        print(json.dumps({"checkpoints": shown, "newest": newest.folder, "tensors": tensors, "values": newest.values}))
        return 0
    out = Console()
    table = Table(title=found.place.address)
    for heading in ("checkpoint", "saved", "ranks", "GB", "score"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    for facts in shown:
        if "damaged" in facts:
            table.add_row(facts["checkpoint"], "damaged: see verify", "", "", "")
            continue
        score = "" if facts["score"] is None else f"{facts['score']:.4f}"
        table.add_row(facts["checkpoint"], facts["saved"], str(facts["ranks"]), f"{facts['bytes'] / 1e9:.3f}", score)
    out.print(table)
    out.print(_tensors(newest.folder, newest.manifest))
    return 0


def _facts(saved: Saved) -> dict[str, Any]:
    manifest = saved.manifest
    return {
        "checkpoint": saved.folder,
        "step": manifest.step,
        "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved)),
        "ranks": manifest.world_size,
        "bytes": sum(part.size for part in manifest.parts.values()),
        "score": manifest.score,
    }


def _tensors(folder: str, manifest: Manifest) -> Table:
    """One line for each kind of tensor; the many of a backbone together."""
    table = Table(title=f"in {folder}")
    for heading in ("tensors", "number", "dtype", "shape", "MB"):
        table.add_column(heading, justify="left" if heading == "tensors" else "right")
    groups: dict[str, list[str]] = {}
    for name in manifest.tensors:
        first, _, rest = name.partition(".")
        many = first == "backbone" or name.startswith("optimizer.backbone.")
        groups.setdefault(f"{first}.{rest.partition('.')[0]}.*" if many and first != "backbone" else
                          "backbone.*" if many else name, []).append(name)  # fmt: skip
    for group, names in groups.items():
        entries = [manifest.tensors[name] for name in names]
        size = sum(entry.rows * entry.row_bytes for entry in entries)
        kinds = sorted({entry.dtype for entry in entries})
        shape = "x".join(map(str, entries[0].shape)) if len(entries) == 1 else ""
        table.add_row(group, str(len(names)), " ".join(kinds), shape, f"{size / 1e6:.1f}")
    return table


def _verify(args: argparse.Namespace, console: Console) -> int:
    found, names = checkpoints_at(args.where)
    broken = 0
    for name in names:
        try:
            wrong = _read_all(Saved(found.place, name), console)
        except DamagedError as error:
            wrong = [str(error)]
        for line in wrong:
            print(line)
        print(f"{name}: {'whole' if not wrong else f'damaged, {len(wrong)} finding(s)'}")
        broken += bool(wrong)
    return 1 if broken else 0


def _read_all(saved: Saved, console: Console) -> list[str]:
    total = sum(part.size for part in saved.manifest.parts.values())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    wrong = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(saved.folder, total=total)
        for size, finding in damage(saved):
            progress.advance(task, size)
            if finding:
                wrong.append(finding)
    return wrong


def _export(args: argparse.Namespace, console: Console) -> int:
    suffixes = (".pt", ".safetensors", ".npy") if args.what == "centres" else (".pt", ".safetensors")
    if args.out.suffix not in suffixes:
        raise CheckpointError(f"--out: expected a name that ends with {' or '.join(suffixes)}, got {args.out}")
    saved = newest_at(args.where)
    numbers = (export_centres if args.what == "centres" else export_backbone)(saved, args.out)
    console.print(
        f"{args.out}: {args.what} after {saved.manifest.step} steps, {numbers / 1e6:.1f} million numbers",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _reshard(args: argparse.Namespace, console: Console) -> int:
    saved = newest_at(args.where)
    try:
        made = reshard(saved, args.out, args.ranks, is_cut)
    except OSError as error:
        raise CheckpointError(f"{error.filename or args.out}: cannot write it ({error.strerror or error})") from None
    console.print(
        f"{made.address}: step {made.manifest.step}, of {saved.manifest.world_size} rank(s), now of {args.ranks}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0
