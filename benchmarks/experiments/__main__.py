"""Does cluster guidance help? Paired trainings on synthetic faces and glyphs; benchmarks/experiments/plan.py says how.

    python -m benchmarks.experiments tune      each arm's tries, on seeds of their own
    python -m benchmarks.experiments run       the runs that count
    python -m benchmarks.experiments report    tables, answers and a picture of what is there

All resume: a run whose line exists with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments import plan, tables
from benchmarks.experiments.cells import CELLS
from benchmarks.experiments.glyphs import MissingFontsError
from benchmarks.experiments.pools import KINDS
from benchmarks.experiments.runs import LinesError, Result, execute, read_results
from benchmarks.experiments.tiers import TIERS
from benchmarks.measuring.report import facts

_MODULE = "benchmarks.experiments"
_RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when something is missing (one line says what), 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    for name in ("jobs", "seeds"):
        if (count := getattr(args, name)) < 1:
            parser.error(f"--{name}: expected at least 1, got {count}")
    arms = list(TIERS[args.tier].arms)
    if unknown := [name for name in args.only or () if name not in arms]:
        parser.error(f"--only: expected arms of the tier of {args.tier}, {', '.join(arms)}; got {', '.join(unknown)}")
    args.only = args.only or arms
    torch.set_num_threads(1)
    try:
        results = read_results(args.lines)
        if args.command == "tune":
            execute(
                plan.tuning_runs(args.tier, args.kinds, args.cells, args.only),
                folder=args.folder,
                file=args.lines,
                jobs=args.jobs,
            )
            _say_margins(read_results(args.lines), args.tier)
        elif args.command == "run":
            margins = plan.chosen_margins(results, args.tier)
            seeds = plan.seeds_of(args.round)[: args.seeds]
            runs = plan.final_runs(args.tier, args.kinds, args.cells, args.only, margins, seeds)
            execute(runs, folder=args.folder, file=args.lines, jobs=args.jobs)
        else:
            _report(results, args, arguments)
    except KeyError as missing:
        print(f"error: no margin is chosen for {missing}: run `python -m {_MODULE} tune` first", file=sys.stderr)
        return 2
    except (MissingFontsError, LinesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _say_margins(results: Sequence[Result], tier: str) -> None:
    for (kind, cell, arm), margin in plan.chosen_margins(results, tier).items():
        print(f"{kind}, {cell}: {arm} takes margin {margin:g}")


def _report(results: Sequence[Result], args: argparse.Namespace, arguments: Sequence[str]) -> None:
    about = facts(torch.device("cpu"), _MODULE, arguments)
    pools = sorted({f"{result['kind']} {result['pool']}" for result in results if result["tier"] == args.tier})
    about["pools"] = ", ".join(pools)
    about["arms"] = "; ".join(f"{name}: {arm.about}" for name, arm in TIERS[args.tier].arms.items())
    cells = {
        key: arms
        for key, arms in tables.group(results, args.tier, plan.seeds_of(args.round)).items()
        if key[1] in args.cells
    }
    if not cells:
        raise LinesError(
            f"{args.lines}: expected runs on {args.tier} in {', '.join(args.cells)}, got none: "
            f"`python -m {_MODULE} run` makes them; {args.out} stays as it is"
        )
    lines = tables.fresh_answers(cells) if args.round else tables.answers(cells, args.tier)
    tables.write(cells, args.tier, about, lines, args.out)
    for line in lines:
        print(line)
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("tune", "run", "report"))
    parser.add_argument("--tier", choices=("features", "images"), default="features", help="default features")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(plan.PRIMARY_CELLS), metavar="CELL")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="default all of the tier")
    parser.add_argument(
        "--seeds", type=int, default=len(plan.seeds_of(0)), help="run: only so many; default all, for answers"
    )
    parser.add_argument(
        "--round",
        type=int,
        choices=(0, *plan.ROUNDS),
        default=0,
        help="run, report: of questions, each on its own seeds",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each; default 1")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments"), help="of images and features")
    parser.add_argument(
        "--lines", type=Path, default=_RESULTS / "experiments.jsonl", help="a line for each run; default in results/"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/report.md"), help="of report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
