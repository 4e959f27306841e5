"""How many images a second reach training, against a bare decoder and the two ways of insightface?

All ways of `benchmarks.loaders.arms` deliver batches of the same records, in one process, in turns. The records are the
first of a set, or drawn faces. Quote the ratios, and those of CPU seconds before those by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.loaders.arms import BARE, DALI_READER, DATA_LOADER, FILLING, Arm, Outcome, arms, run
from benchmarks.loaders.records import working_copy
from benchmarks.measuring.report import digits, facts, publish, spread
from data.errors import DataError
from data.rec.records import RecordSet

HEADER = (
    "threads", "way", "images/s", "range", "images/CPU s", "range CPU", "of bare", "x DataLoader", "x DALI",
    "clock x DataLoader", "clock x DALI",
)  # fmt: skip
ONLY_IN_FILE = ("range", "range CPU", "clock x DataLoader", "clock x DALI")
_WARM_UP = 4  # batches
_LEGEND = {
    "images/CPU s": "a second of CPU time of all threads and worker processes, which other work on the same cores "
    "disturbs less than the clock",
    "of bare": f"images/CPU s over that of {BARE} with as many threads, a loop that decodes into the same pixels again "
    f"and again: the limit; {FILLING}: the least that a loader has to do, shuffled, without checks",
    "x DataLoader, x DALI": f"images/CPU s over that of {DATA_LOADER}, and of {DALI_READER} with as many threads; "
    "clock: the same of images/s",
    "to floats": "ours hand out bytes, which training normalises on its device, and the two peers floats; this way "
    "normalises as well, in the consumer's thread",
    "augmented": "each of configs/augment.py's changes comes to 0.2 of the images",
    "peers": "written by us from a description, kinder than they are (benchmarks/loaders/peers.py)",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Figures of one way, an entry of wall and cpu for each turn."""

    way: str
    threads: str
    images: int
    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def a_second(self) -> list[float]:
        return [self.images / seconds for seconds in self.wall]

    @property
    def a_cpu_second(self) -> list[float]:
        return [self.images / seconds for seconds in self.cpu]


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them."""

    def ratio(way: str, *, clock: bool = False) -> float | None:
        """To a way with as many threads, or else to its first row."""
        found = [other for other in rows if other.way == way]
        if not found:
            return None
        other = next((other for other in found if other.threads == row.threads), found[0])
        mine, its = (each.a_second if clock else each.a_cpu_second for each in (row, other))
        return statistics.median(mine) / statistics.median(its)

    def times(way: str, *, clock: bool = False) -> str:
        value = ratio(way, clock=clock)
        return "-" if value is None else f"{value:.2f}"

    return (
        row.threads,
        row.way,
        digits(statistics.median(row.a_second)),
        spread(row.a_second),
        digits(statistics.median(row.a_cpu_second)),
        spread(row.a_cpu_second),
        f"{ratio(BARE):.0%}",
        times(DATA_LOADER),
        times(DALI_READER),
        times(DATA_LOADER, clock=True),
        times(DALI_READER, clock=True),
    )


def measure(records: RecordSet, args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """A row for each way, and why the others are left out."""
    found, left_out = arms(records, batch=args.batch, threads=args.threads, device=device)
    steps = records.num_samples // args.batch
    for arm in found:
        run(arm, min(_WARM_UP, steps), device)
    outcomes: dict[Arm, list[Outcome]] = {arm: [] for arm in found}
    for turn in range(args.repeats):
        first = turn % len(found)  # nobody always comes first
        for arm in (*found[first:], *found[:first]):
            outcomes[arm].append(run(arm, steps, device))
            _check(arm, outcomes[arm][-1], records, steps * args.batch)
    rows = [
        Row(
            way=arm.way,
            threads=arm.threads,
            images=steps * args.batch,
            wall=tuple(outcome.wall for outcome in of_arm),
            cpu=tuple(outcome.cpu for outcome in of_arm),
        )
        for arm, of_arm in outcomes.items()
    ]
    return rows, left_out


def _check(arm: Arm, outcome: Outcome, records: RecordSet, images: int) -> None:
    """Raises RuntimeError when a way delivered less than its time is divided by, or, of a whole set, other images."""
    labels = int(records.labels.sum()) if images == records.num_samples else outcome.label_sum
    if (outcome.images, outcome.label_sum) != (images, labels):
        raise RuntimeError(
            f"{arm.way}: expected {images} images with labels that sum to {labels}, got {outcome.images} and "
            f"{outcome.label_sum}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, metavar="SET", help="a record set, default synthetic faces")
    parser.add_argument(
        "--images",
        type=int,
        default=20_000,
        metavar="N",
        help="drawn, or the first of SET; a copy is made; default 20000",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="Q",
        help="encode them anew as JPEGs of this quality, 1 to 100, as im2rec does: insightface's way to WebFace42M's "
        "records is im2rec --quality 100",
    )
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="default 128")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="T", help="that decode, default 1 2")
    parser.add_argument("--repeats", type=int, default=3, help="turns, default 3")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument or the set is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.batch, args.repeats, *args.threads) < 1:
        parser.error("expected --batch, --threads and --repeats of at least 1")
    if args.quality is not None and not 1 <= args.quality <= 100:
        parser.error(f"expected a --quality from 1 to 100, got {args.quality}")
    if args.images < args.batch:
        parser.error(f"expected no fewer images than a batch has, got {args.images} and {args.batch}")
    if len(set(args.threads)) < len(args.threads):
        parser.error("expected each number of --threads once")
    torch.set_num_threads(1)  # the consumer's arithmetic, beside the threads that decode
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        with working_copy(args.folder, args.images, args.quality) as records:
            if records.num_samples < args.batch:
                parser.error(f"expected good JPEGs for a batch of {args.batch}, found {records.num_samples}")
            about = facts(device, "benchmarks.data", arguments)
            rows, left_out = measure(records, args, device)
            about |= {name: f"left out: {reason}" for name, reason in left_out.items()}
            about["records"] = _what(records, args)
    except DataError as error:
        parser.error(str(error))
    about["versions of decoders"] = _versions()
    about |= _LEGEND
    texts = [cells(row, rows) for row in rows]
    data = [dataclasses.asdict(row) for row in rows]
    publish("Images to training", HEADER, texts, about=about, rows=data, out=args.out, only_in_file=ONLY_IN_FILE)
    return 0


def _what(records: RecordSet, args: argparse.Namespace) -> str:
    size = records.bytes / records.num_samples
    origin = "drawn faces" if args.folder is None else "of the set"
    if args.quality is not None:
        origin += f" encoded anew with quality {args.quality}"
    height, width = records.image_size
    return (
        f"{records.num_samples:,} images, {origin}, {height} x {width}, {size:.0f} bytes each, "
        f"without identity headers, in memory; B = {args.batch}, {records.num_samples // args.batch} batches a "
        f"pass, median of {args.repeats} turns"
    )


def _versions() -> str:
    found = []
    for name in ("simplejpeg", "nvidia-dali-cuda130", "pillow", "opencv-python-headless"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
