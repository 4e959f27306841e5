"""`python -m data subset`, `split`, `merge`, `shuffle`: new sets out of images of others, which are only read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from data.commands.arguments import fraction, shown, whole
from data.errors import DataError
from data.making.choosing import merge, split, subset
from data.making.rewrite import Selection, names_of_set, names_text, refuse_set, refuse_source, texts_of, write_set
from data.making.shuffling import MEMORY, shuffled
from data.rec.places import where
from data.rec.recordio import Where
from data.rec.records import RecordSet


def add(commands: Any) -> None:
    """Register the commands."""
    parser = commands.add_parser("subset", help="some identities of a set, or some images of each")
    _one(parser, _subset)
    parser.add_argument("--identities", type=whole(1), metavar="N", help="draw so many")
    parser.add_argument("--list", type=Path, metavar="FILE", help="only these: a class or a name on each line")
    parser.add_argument("--min-images", type=whole(1), default=1, metavar="N", help="only those with so many or more")
    parser.add_argument("--max-images", type=whole(1), metavar="N", help="draw so many of each at most")

    parser = commands.add_parser("split", help="two sets with no identity in common")
    _one(parser, _split)
    parser.add_argument("--rest", type=Path, required=True, metavar="FOLDER", help="for the other identities")
    parser.add_argument("--share", type=fraction, required=True, help="of the identities, for --out")

    parser = commands.add_parser(
        "merge", help="several sets as one: their classes one behind the other, or the same as one"
    )
    parser.add_argument("sets", type=where, nargs="+", metavar="SET")
    _out(parser, _merge)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--by-name", action="store_true", help="the same line in identities.txt is one class")
    about = "CSV with the columns set (from 1, as given here), label, new_label; other classes are left out"
    how.add_argument("--map", type=Path, metavar="FILE", help=about)

    parser = commands.add_parser("shuffle", help="the records of a set in a random order, to be read front to back")
    _one(parser, _shuffle)
    about = f"MB of memory, default {MEMORY >> 20}"
    parser.add_argument("--memory", type=whole(1), default=MEMORY >> 20, metavar="MB", help=about)


def _out(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--force", action="store_true", help="replace a set that is there")
    parser.set_defaults(run=run)


def _one(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("set", type=where, metavar="SET")
    parser.add_argument("--seed", type=whole(0), default=0, help="of what is drawn, default 0")
    _out(parser, run)


def _subset(args: argparse.Namespace, console: Console) -> int:
    chosen = subset(
        _open(args.set, args.out),
        seed=args.seed,
        identities=args.identities,
        listed=args.list,
        min_images=args.min_images,
        max_images=args.max_images,
    )
    _write(chosen, args.out, args, console)
    return 0


def _split(args: argparse.Namespace, console: Console) -> int:
    if args.out.resolve() == args.rest.resolve():
        raise DataError(f"--rest {args.rest}: expected another folder than --out")
    records = _open(args.set, args.out, args.rest)
    for out in (args.out, args.rest):
        refuse_set(out, force=args.force)  # both before either is written
    for chosen, out in zip(split(records, share=args.share, seed=args.seed), (args.out, args.rest), strict=True):
        _write(chosen, out, args, console)
    return 0


def _merge(args: argparse.Namespace, console: Console) -> int:
    sets = [_open(folder, args.out) for folder in args.sets]
    _write(merge(sets, by_name=args.by_name, table=args.map), args.out, args, console)
    return 0


def _shuffle(args: argparse.Namespace, console: Console) -> int:
    records = _open(args.set, args.out)
    images = shuffled(records, seed=args.seed, folder=args.out, memory=args.memory << 20)
    classes = int(records.labels.max()) + 1  # without identity headers none tells of classes behind the last image's
    names = names_of_set(records)[:classes]
    count = write_set(
        args.out,
        shown(images, "images", records.num_samples, console),
        num_classes=classes,
        image_size=records.image_size,
        texts=names_text(names),
        force=args.force,
        sequential=True,
    )
    print(f"{args.out}: {count} images of {classes} identities, without identity headers")
    return 0


def _open(folder: Where, *outs: Path) -> RecordSet:
    for out in outs:
        refuse_source(out, folder)
    return RecordSet.open(folder)


def _write(chosen: Selection, out: Path, args: argparse.Namespace, console: Console) -> None:
    images = chosen.images(chosen.ordered().tolist())
    count = write_set(
        out,
        shown(images, "images", chosen.kept, console),
        num_classes=chosen.num_classes,
        image_size=chosen.sets[0].image_size,
        texts=texts_of(chosen),
        force=args.force,
    )
    print(f"{out}: {count} images of {chosen.num_classes} identities; labels.csv says what they were")
