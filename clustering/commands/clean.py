"""`python -m clustering clean`: a cleaned copy of a record set, by findings that somebody has looked through."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clustering.commands.arguments import whole
from clustering.commands.names import identities
from clustering.job.together import InputError
from clustering.report.cleaning import Actions, Plan, plan
from clustering.report.data import Ints
from data.errors import DataError
from data.files import appearing
from data.making.pack import write_records
from data.rec.header import EXACT
from data.rec.places import where
from data.rec.properties import Properties
from data.rec.recordio import Where
from data.rec.records import RecordSet

_FILES = ("train.rec", "property", "train.lst", "changes.csv", "labels.csv", "train.idx")
"""In the order they appear: the index last."""
_EPILOG = """
Look through the report first, and delete rows from its CSV files that you do not agree with. Written are train.rec,
train.idx and property, train.lst (key, label, sample of the original), changes.csv (what happened to which sample) and
labels.csv (what the new labels were). The original set is only read.

    python -m clustering clean report --records sets/mine --out sets/cleaned --drop-noise --drop-copies
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "clean",
        help="a cleaned copy of a record set, by a report",
        description="Writes a cleaned copy of a record set by the CSV files of a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="the folder that `report` wrote")
    parser.add_argument("--records", type=where, required=True, metavar="FOLDER", help="the set that was reported on")
    parser.add_argument("--out", type=Path, required=True, metavar="CLEANED", help="a folder for the cleaned set")
    for flag, about in (
        ("--relabel", "samples that look like another label (closed) go there"),
        ("--drop-noise", "leave other suspected wrong labels out; without --relabel all"),
        ("--split", "groups that look like another person become a label of their own, or join the one they look like"),
        ("--merge-duplicates", "labels that look like one person become one"),
        ("--drop-copies", "keep one of each picture"),
    ):
        parser.add_argument(flag, action="store_true", help=about)
    about = "then leave out labels with fewer images than this, default 1"
    parser.add_argument("--min-images", type=whole(1), default=1, metavar="N", help=about)
    parser.add_argument("--dry-run", action="store_true", help="count what would change, and write nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when done, 2 when arguments or files are not as expected, 130 when interrupted; one line says what."""
    try:
        _clean(args)
    except (InputError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _clean(args: argparse.Namespace) -> None:
    actions = Actions(
        relabel=args.relabel,
        drop_noise=args.drop_noise,
        split=args.split,
        merge_duplicates=args.merge_duplicates,
        drop_copies=args.drop_copies,
        min_images=args.min_images,
    )
    if not actions.any:
        raise InputError(
            "expected at least one of --relabel, --drop-noise, --split, --merge-duplicates, --drop-copies, --min-images"
        )
    _check_out(args.out, args.records, args.report)
    records = RecordSet.open(args.records)
    planned = plan(args.report, records.labels, records.num_classes, actions)
    _count(planned, records)
    if args.dry_run:
        return
    _write(args.out, planned, records)
    print(f"{args.out}: {planned.kept} images of {len(planned.origin_L)} identities")


def _check_out(out: Path, records: Where, report: Path) -> None:
    """Raise InputError where writing could touch the original set or the report."""
    for name, folder in (("--records", records), ("the report", report)):
        if not isinstance(folder, Path):
            continue
        one, other = out.resolve(), folder.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise InputError(f"--out {out}: expected a folder apart from {name} ({folder}), got one inside the other")
    there = [name for name in _FILES if (out / name).exists()]
    if there:
        raise InputError(f"--out {out}: expected no set there, found {there[0]}: name another folder")


def _count(planned: Plan, records: RecordSet) -> None:
    """Say what will change before anything is written."""
    reasons = Counter(_general(why) for why in planned.why_N if why)
    for why, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count} samples: {why}")
    print(
        f"{planned.kept} of {records.num_samples} samples stay, under {len(planned.origin_L)} labels instead of "
        f"{records.num_classes}"
    )


def _general(why: str) -> str:
    """A reason without the numbers of samples in it."""
    return "; ".join("copy" if part.startswith("copy of ") else part for part in why.split("; "))


def _write(out: Path, planned: Plan, records: RecordSet) -> None:
    """All files appear, or none. Images are copied byte for byte, by (new label, sample)."""
    kept = np.flatnonzero(planned.label_N >= 0)
    order = kept[np.argsort(planned.label_N[kept], kind="stable")]
    total = len(planned.origin_L)
    names = identities(records)
    files = [*_FILES[:-1], *(["identities.txt"] if names else []), _FILES[-1]]
    with appearing([out / name for name in files]) as partial:
        to = dict(zip(files, partial, strict=True))
        properties = Properties(num_classes=total, image_size=records.image_size, pair=total > EXACT)
        to["property"].write_text(properties.text(), encoding="ascii")
        with to["train.lst"].open("w", encoding="ascii") as file:
            for key, sample in enumerate(order.tolist(), start=1):
                file.write(f"{key}\t{planned.label_N[sample]}\t{sample}\n")
        with to["changes.csv"].open("w", encoding="utf-8", newline="") as file:
            changes = csv.writer(file, lineterminator="\n")
            changes.writerow(["sample", "old_label", "new_label", "why"])
            for sample in [number for number, why in enumerate(planned.why_N) if why]:
                label = int(planned.label_N[sample])
                changes.writerow(
                    [sample, int(records.labels[sample]), "dropped" if label < 0 else label, planned.why_N[sample]]
                )
        with to["labels.csv"].open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["new_label", "old_labels"])
            table.writerows([new, " ".join(map(str, old))] for new, old in enumerate(planned.origin_L))
        if names:
            lines = (" = ".join(names[label] for label in old) for old in planned.origin_L)
            to["identities.txt"].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_records(to["train.rec"], to["train.idx"], _images(order, planned, records), num_classes=total)


def _images(order: Ints, planned: Plan, records: RecordSet) -> Iterator[tuple[int, bytes]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        for sample in progress.track(order.tolist(), description="images"):
            yield int(planned.label_N[sample]), bytes(records.image(sample)[1])
