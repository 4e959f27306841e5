"""Does a training on two ranks survive what happens to machines, and end as if nothing had happened?

kills: SIGKILL of a rank, again and again; torchrun starts the ranks anew, and they go on by themselves.
soak: one process group lives through faults that end no process, then trainings through faults that do.

Exit code 0: all as promised. 1: something was not, see `unexpected` in the result.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.measuring.report import digits, facts, publish
from benchmarks.surviving import ends as survival_ends
from benchmarks.surviving import group as survival_group
from benchmarks.surviving import kills as survival_kills
from benchmarks.surviving.group import Fault, Group
from benchmarks.surviving.runs import Run, UnexpectedError, compare, pack, undisturbed
from benchmarks.surviving.samples import Growth, growths, save_plot
from data.commands.arguments import whole

_KILLS = ("kill", "what was going on", "rank", "resumed at", "steps again", "s")
_FAULTS = ("faults", "kind", "median s", "max s", "again")
Tell = Callable[[str], None]


@contextmanager
def _telling(title: str, total: int) -> Iterator[Tell]:
    """On a terminal a bar that moves with each line, elsewhere lines with the minutes. total 0: it is not known."""
    console, begin = Console(stderr=True), time.monotonic()
    columns = (TextColumn(title), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total or None)

        def tell(line: str) -> None:
            minutes = (time.monotonic() - begin) / 60
            progress.console.print(f"{minutes:5.1f} min  {line}", highlight=False, soft_wrap=True, markup=False)
            progress.update(task, advance=1, description=line.partition(":")[0])

        yield tell


def _kills(args: argparse.Namespace, folder: Path, about: dict[str, str]) -> int:
    recipe = survival_kills.recipe(pack(folder), args.kills)
    plan = survival_kills.plan(args.kills, args.seed)
    found: list[survival_kills.Killed] = []
    about["s"] = "seconds from the kill to the next step"
    about["training"] = f"2 ranks, {recipe.steps} steps, a checkpoint every {recipe.checkpoint_steps}"
    try:
        with _telling("kills", args.kills + 1) as tell:
            seconds = undisturbed(recipe, folder / "whole")
            tell(f"undisturbed: {seconds:.0f} s")
            begin = time.monotonic()
            with Run(recipe, folder / "killed", restarts=args.kills) as run:
                found.extend(survival_kills.strike(run, plan, tell))
            about["time"] = f"{seconds:.0f} s undisturbed, {time.monotonic() - begin:.0f} s with the kills"
            same = compare(folder / "whole", folder / "killed", recipe.steps)
            about["at the end"] = f"{same} tensors of backbone.pt and the last checkpoint, all the same bit for bit"
    except UnexpectedError as error:
        about["unexpected"] = str(error).partition("\n")[0]
        print(f"unexpected: {error}", file=sys.stderr)
    if found:
        about["while a checkpoint was being written"] = f"{sum(one.saving >= 0 for one in found)} of {len(found)}"
        about["steps done again"] = f"{sum(one.twice for one in found)}"
        waits = [one.seconds for one in found]
        about["next step after"] = f"median {statistics.median(waits):.1f} s, at most {max(waits):.1f} s"
    texts = [
        (f"{number + 1}", survival_kills.doing(one), f"{one.rank}", f"{one.resumed}", f"{one.twice}",
         digits(one.seconds)) for number, one in enumerate(found)
    ]  # fmt: skip
    title = f"Survival: SIGKILL of a rank, {len(found)} times"
    publish(title, _KILLS, texts, about=about, rows=[one._asdict() for one in found], out=args.out)
    return int("unexpected" in about)


def _soak(args: argparse.Namespace, folder: Path, about: dict[str, str]) -> int:
    data, draw, begin = pack(folder), random.Random(args.seed), time.monotonic()
    end = begin + 60 * args.minutes
    group: Group | None = None
    faults: list[Fault] = []
    grown: list[Growth] = []
    cycles = 0
    try:
        with _telling("soak", 0) as tell:
            group = survival_group.live(data, folder, begin + 30 * args.minutes, draw, tell)
            grown = growths(group.samples)
            recipe = survival_ends.recipe(data)
            undisturbed(recipe, folder / "whole")
            tell(f"undisturbed training of {recipe.steps} steps: done")
            while not cycles or time.monotonic() < end:
                output = folder / f"cycle_{cycles}"
                faults += survival_ends.cycle(recipe, output, folder / "whole", end, draw, tell)
                cycles += 1
        if too_much := [growth.what for growth in grown if growth.is_too_much]:
            about["unexpected"] = f"grew: {', '.join(too_much)}"
    except UnexpectedError as error:
        about["unexpected"] = str(error).partition("\n")[0]
        print(f"unexpected: {error}", file=sys.stderr)
    about["minutes"] = f"{(time.monotonic() - begin) / 60:.1f}"
    if group is not None:
        about["one process group"] = f"{group.steps} steps, {len(group.faults)} faults, none restarted a process"
        about["left of saves that failed"] = ", ".join(group.remains) or "nothing"
        if group.left_out:
            about["left out"] = group.left_out
        for growth in grown:
            change = f"{100 * (growth.last / growth.first - 1):+.1f} %"
            about[growth.what] = f"{growth.first:g} in the first quarter, {growth.last:g} in the last ({change})"
        if args.out is not None and group.samples:
            plot = args.out.with_suffix(".png")
            save_plot(group.samples, [(fault.begin - group.begin, fault.kind) for fault in group.faults], plot)
            about["plot"] = f"![memory, descriptors and threads over time]({plot.name})"
    about["trainings with faults that end processes"] = (
        f"{cycles} to their end, the same bit for bit as the undisturbed one: nothing was lost"
    )
    about["s"] = "from the fault to the next step; from the end of the fault where it lasts for a while"
    about["again"] = "steps that were done twice"
    everything = [*(group.faults if group is not None else []), *faults]
    rows = [fault._asdict() for fault in everything] + [s._asdict() for s in (group.samples if group else [])]
    publish("Survival: a soak", _FAULTS, _by_kind(everything), about=about, rows=rows, out=args.out)
    return int("unexpected" in about)


def _by_kind(faults: Sequence[Fault]) -> list[tuple[str, ...]]:
    texts: list[tuple[str, ...]] = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [fault for fault in faults if fault.kind == kind]
        seconds = [fault.seconds for fault in own]
        times = (digits(statistics.median(seconds)), digits(max(seconds)))
        texts.append((f"{len(own)}", kind, *times, f"{sum(fault.twice for fault in own)}"))
    return texts


def _interrupted(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all was as promised, 1 when something was not, 130 when it was interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.survival", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    kills = commands.add_parser("kills", help="SIGKILL of a rank, again and again")
    kills.add_argument("--kills", type=whole(1), default=20, help="default 20")
    kills.set_defaults(command=_kills)
    soak = commands.add_parser("soak", help="faults of all kinds for a while")
    soak.add_argument("--minutes", type=float, default=30, help="of which half for faults that end no process")
    soak.set_defaults(command=_soak)
    for command in (kills, soak):
        command.add_argument("--seed", type=int, default=1, help="of what happens when, default 1")
        command.add_argument("--folder", type=Path, help="to work in, which is kept; without it a temporary one")
        command.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(arguments)
    about = facts(torch.device("cpu"), "benchmarks.survival", arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    with ExitStack() as stack:
        if args.folder is None:
            made = tempfile.TemporaryDirectory(prefix="survival-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        else:
            folder = args.folder
            folder.mkdir(parents=True)
        try:
            return int(args.command(args, folder, about))
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
