"""`python -m evaluation compare`: trainings beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from data.errors import DataError
from evaluation.commands.results import PAGE, percent, refuse_present, refuse_ranks, show, write_results
from evaluation.page import Summary, Table
from evaluation.plots import label, roc_figure
from evaluation.runs import FOLDER, Run, differing, read_run

_FILE = "compare.json"
_METHOD = (
    "Accuracy on each set: the last one, and the first of the best. A step made again after a stop counts as it was "
    "made last.",
    "Images per second: the median over the lines of metrics.jsonl.",
    f"ROC curves: of runs that have the scores of `python -m evaluation verify --out` in their folder {FOLDER}/.",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="trainings beside each other: accuracy, speed, settings that differ",
        epilog="Example: python -m evaluation compare runs/a runs/b --out runs/a-b",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a training's output folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"{_FILE}, {PAGE}, and roc_<set>.png of the runs that have scores in {FOLDER}/, from verify --out",
    )
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.set_defaults(run_alone=_run)


def _run(args: argparse.Namespace, console: Console) -> None:
    refuse_ranks()
    refuse_present(args.out, [_FILE], force=args.force)
    if len(set(args.runs)) < len(args.runs):
        raise DataError(f"expected different runs, got {', '.join(map(str, args.runs))}")
    runs = [read_run(folder) for folder in args.runs]
    header = ("run", "steps", "images/s", "set", "last %", "best %", "at step")
    tables = [Table("Runs", header, [row for run in runs for row in _rows(run)])]
    settings = differing(runs)
    if settings:
        rows = [(name, *("" if value is None else str(value) for value in found)) for name, found in settings.items()]
        tables.append(Table("Settings that differ", ("", *(run.name for run in runs)), rows, figures=False))
    for table in tables:
        show(table)
    if args.out is not None:
        sets = sorted({name for run in runs for name in run.curves})
        figures = {
            f"roc_{name}.png": roc_figure(
                {label(run.name): run.curves[name] for run in runs if name in run.curves}, title=label(name)
            )
            for name in sets
        }
        content = {"runs": [_describe(run) for run in runs], "settings": settings}
        summary = Summary("Runs beside each other", [("runs", ", ".join(run.name for run in runs))], tables, _METHOD)
        write_results(args.out, _FILE, content, summary, figures=figures)


def _rows(run: Run) -> list[tuple[str, ...]]:
    speed = "" if run.images_per_second is None else f"{run.images_per_second:.0f}"
    start = (run.name, str(run.steps), speed)
    rows = [
        (name, percent(found.last["accuracy"]), percent(found.best["accuracy"]), str(found.best["step"]))
        for name, found in run.sets.items()
    ] or [("", "", "", "")]
    return [(*(start if number == 0 else ("", "", "")), *row) for number, row in enumerate(rows)]


def _describe(run: Run) -> dict[str, Any]:
    return {
        "run": run.name,
        "steps": run.steps,
        "images_per_second": run.images_per_second,
        "sets": {name: {"last": found.last, "best": found.best} for name, found in run.sets.items()},
    }
