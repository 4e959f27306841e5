"""`python -m training start`: a new run begins with what another has learnt, also where the classes are others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from configs.load import load_config
from configs.schema import RunConfig
from data.commands.arguments import progress_on, whole
from data.errors import DataError
from data.making.rewrite import names_of_set
from data.rec.records import RecordSet
from training.checkpoint import CheckpointError
from training.checks import open_records
from training.ranks.agreement import facts_of, label_digest
from training.warm.class_map import ClassMap, by_name, no_classes, read_map, same_classes
from training.warm.start_source import Source, old_names, source_at
from training.warm.warm_start import Started, write_start

_IMAGES = 16
_NAMED = 5
_EPILOG = "--by-name and --map look for the set that the centres were trained on where the run found it."


def add(commands: Any) -> None:
    """Adds the subcommand to a parser's."""
    parser = commands.add_parser(
        "start",
        help="write a checkpoint of step 0 with the weights of another run, also for other classes",
        epilog=_EPILOG,
    )
    about = "a run's output, one of its checkpoints (step_…), or a file of a backbone's weights"
    parser.add_argument("--from", dest="origin", required=True, metavar="PATH", help=about)
    about = "class centres in place of the run's: a file that `checkpoint export` wrote, or arcface_torch's files"
    parser.add_argument("--centres", type=Path, nargs="+", default=[], metavar="PATH", help=about)
    parser.add_argument("--config", type=Path, metavar="FILE", help="of the new run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--ranks", type=whole(1), default=1, metavar="N", help="of the new run; default 1")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--same", action="store_true", help="a class takes the centre of its number, of as many")
    how.add_argument("--by-name", action="store_true", help="of the same line in both sets' identities.txt")
    about = "of the old class by lines `new old`, or by the labels.csv that was written beside the new set"
    how.add_argument("--map", type=Path, metavar="FILE", help=about)
    about = "the set that the centres were trained on, or its identities.txt; a path as it stands in a labels.csv"
    parser.add_argument("--old-set", default="", metavar="PATH", help=about)
    about = "classes without a counterpart: the mean embedding of their images, or new centres"
    parser.add_argument("--others", choices=("mean", "random"), help=about)
    about = f"images of each class for --others mean, at most; default {_IMAGES}"
    parser.add_argument("--images", type=whole(1), metavar="N", help=about)
    parser.set_defaults(run=_start)


def _start(args: argparse.Namespace, console: Console) -> int:
    config = load_config(args.config, args.set)
    if args.images and args.others != "mean":
        raise DataError("--images: expected --others mean beside it: nothing else reads images")
    source = source_at(args.origin, args.centres, config.model)
    records = open_records(config.data)
    try:
        classes = _classes(args, source, records, config)
        others = np.flatnonzero(classes.count_C == 0)
        if len(others) and args.others is None:
            raise DataError(
                f"{len(others)} of {classes.num_classes} classes have no counterpart ({_listed(records, others)}): say "
                "what they begin with, by --others mean or --others random, and which classes are which by --same, "
                "--by-name or --map"
            )
        is_other_set = args.same and source.records not in (None, _facts(config, records))
    finally:
        records.close()
    with progress_on(console) as bar:
        task = bar.add_task("images", total=None)
        started = write_start(
            config,
            ranks=args.ranks,
            weights=source.weights,
            heads=source.centres,
            classes=classes,
            images=(args.images or _IMAGES) if args.others == "mean" else 0,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    how = "map" if args.map else "name" if args.by_name else "number"
    _report(started, config, classes, how)
    if is_other_set:
        print(
            "the records are others than the old run's: nothing but the number of classes says that these are the same"
        )
    return 0


def _classes(args: argparse.Namespace, source: Source, records: RecordSet, config: RunConfig) -> ClassMap:
    chosen = "--same" if args.same else "--by-name" if args.by_name else "--map" if args.map else ""
    num_classes = records.num_classes
    if args.old_set and chosen not in ("--by-name", "--map"):
        raise DataError("--old-set: expected --by-name or --map beside it: nothing else looks at that set")
    if source.centres is None:
        if chosen:
            raise CheckpointError(f"{chosen}: expected class centres, found a backbone alone: name them by --centres")
        return no_classes(num_classes, 0)
    num_old = source.centres.num_classes
    if args.same:
        return same_classes(num_classes, num_old)
    if args.map:
        return read_map(args.map, num_classes=num_classes, num_old=num_old, old_set=args.old_set or source.path)
    if not args.by_name:
        return no_classes(num_classes, num_old)
    new = names_of_set(records)
    if not new:
        raise DataError(f"{records.address}: expected identities.txt, which --by-name needs: write one, or use --map")
    old, old_at = old_names(source, num_old, args.old_set, config)
    return by_name(new, old, new_at=records.address, old_at=old_at)


def _facts(config: RunConfig, records: RecordSet) -> dict[str, Any]:
    return facts_of(config, records, label_digest(records), 0)["records"]


def _listed(records: RecordSet, classes: Any) -> str:
    names = names_of_set(records)
    some = [f"{label} {names[label]!r:.60}" if names else str(label) for label in classes[:_NAMED].tolist()]
    return ", ".join(some) + (", …" if len(classes) > _NAMED else "")


def _report(started: Started, config: RunConfig, classes: ClassMap, how: str) -> None:
    print(
        f"{started.address}: {config.model.backbone} and {classes.num_classes} class centres; train_dist.py goes on "
        "from it with the same settings"
    )
    count_C, means = classes.count_C, started.means
    without = int((count_C == 0).sum())
    of_images = without - means.without if means else 0
    told = [
        f"{int((count_C == 1).sum())} classes by {how}",
        f"{int((count_C > 1).sum())} of several old ones",
        f"{of_images} by the mean of their images",
        f"{without - of_images} at random",
    ]
    print(", ".join(told))
    if means:
        print(
            f"{means.images} images were embedded, {means.bad} could not be"
            + (f"; of {means.without} classes none was left, which begin at random" if means.without else "")
        )
    if classes.num_old:
        print(f"{classes.unused} of {classes.num_old} old class centres are not used")
