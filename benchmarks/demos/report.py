"""Command line and table of the benchmarks that train on the demo's faces (`benchmarks.demos.runs`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.demos.runs import Result
from benchmarks.measuring.report import publish

HEADER = ("seeds", "arm", "classes", "loss", "accuracy %", "of each", "TAR %", "of each seed")
ONLY_IN_FILE = ("classes", "of each", "of each seed")
_MEANING = {
    "classes": "that take part in a step, on average over the run; of those drawn, the expected number",
    "loss": "of the margin softmax, mean over the first and over the last epoch; losses of different margins, and of "
    "different numbers of classes, do not compare",
    "accuracy, TAR": "verification of identities never trained on, untrained -> trained, and trained for each seed; "
    "TAR at a FAR of 1e-2",
}


def cells(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The texts of a row for each arm, as HEADER names them: means over its seeds, and each seed in their order."""
    arms = {result["arm"]: [other for other in results if other["arm"] == result["arm"]] for result in results}
    return [_row(arm, seeds) for arm, seeds in arms.items()]


def _row(arm: str, seeds: Sequence[Result]) -> tuple[str, ...]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    first, last = (mean([result["loss by epoch"][epoch] for result in seeds]) for epoch in (0, -1))
    texts = [str(len(seeds)), arm, f"{mean([result['classes'] for result in seeds]):.0f}", f"{first:.2f} -> {last:.2f}"]
    for name in ("accuracy", "tar@far=1e-2"):
        before, after = ([100 * result[when][name] for result in seeds] for when in ("untrained", "trained"))
        texts += [f"{mean(before):.1f} -> {mean(after):.1f}", " ".join(f"{value:.1f}" for value in after)]
    return tuple(texts)


def parser_of(
    module: str, question: str, *, arms: Sequence[str], seeds: Sequence[int], folder: str
) -> argparse.ArgumentParser:
    """Of a benchmark that trains these arms. Defaults: all of them, these seeds, this folder."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=question)
    parser.add_argument("--only", nargs="+", choices=arms, default=arms, metavar="ARM", help=f"of {', '.join(arms)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="SEED")
    parser.add_argument("--epochs", type=_count, default=3, help="default 3")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time, a thread each; default 1")
    parser.add_argument("--folder", type=Path, default=Path(folder), help=f"runs and their results, default {folder}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, in Markdown; JSON beside it")
    return parser


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def report(
    title: str, results: Sequence[Result], failed: Mapping[str, str], *, about: dict[str, str], out: Path | None
) -> int:
    """Print the table, write it where `out` says, and say what failed. 1 if anything did, else 0."""
    publish(
        title,
        HEADER,
        cells(results),
        about=about | _MEANING,
        rows=results,
        out=out,
        only_in_file=ONLY_IN_FILE,
    )
    for run, reason in failed.items():
        print(f"error: {run} {reason}", file=sys.stderr)
    return int(bool(failed))
