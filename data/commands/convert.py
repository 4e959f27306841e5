"""`python -m data convert`: record sets to WebDataset shards and back."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data.commands.arguments import shown, whole
from data.commands.numbering import classes_of, origins_text
from data.errors import DataError
from data.files import find_all
from data.loading.decode import declared_size
from data.making.rewrite import refuse_source, write_set
from data.making.webdataset import SHARD_IMAGES, Shards, write_shards
from data.rec.places import Folder, is_address, where
from data.rec.records import RecordSet

_SHARD = re.compile(r"[0-9]{6}\.tar")
"""Names of ours: others' tar files are left alone."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "convert",
        help="a set to WebDataset shards, or shards to a set",
        description="A folder with record files, or its address, becomes tar files of <number>.jpg and <number>.cls; a "
        "folder of such tar files becomes a record set.",
    )
    parser.add_argument("source", type=where, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    about = f"images of a shard, default {SHARD_IMAGES}"
    parser.add_argument("--shard-images", type=whole(1), default=SHARD_IMAGES, metavar="N", help=about)
    about = "from shards: number the classes anew from 0; labels.csv says what they were"
    parser.add_argument("--renumber", action="store_true", help=about)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    """0."""
    refuse_source(args.out, args.source)
    if is_address(args.source) or any(name.endswith(".rec") for name in Folder(args.source).names):
        _to_shards(args, console)
    else:
        _to_records(args, console)
    return 0


def _to_shards(args: argparse.Namespace, console: Console) -> None:
    records = RecordSet.open(args.source)
    there = sorted(path for path in args.out.iterdir() if _SHARD.fullmatch(path.name)) if args.out.is_dir() else []
    if there and not args.force:
        raise DataError(
            f"{args.out}: expected no shards there, found {there[0].name}: name another folder, or use --force"
        )
    images = ((label, bytes(image)) for label, image in map(records.image, range(records.num_samples)))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out, prefix=".convert.") as partial:
            told = shown(images, "images", records.num_samples, console)
            shards = write_shards(Path(partial), told, per_shard=args.shard_images)
            for shard in shards:
                shard.replace(args.out / shard.name)
        for old in {path.name for path in there} - {shard.name for shard in shards}:
            (args.out / old).unlink()
    except OSError as error:
        raise DataError(f"{args.out}: cannot write there ({error.strerror})") from None
    print(f"{args.out}: {records.num_samples} images of {records.num_classes} identities in {len(shards)} shards")


def _to_records(args: argparse.Namespace, console: Console) -> None:
    shards = Shards(find_all([args.source], ".tar"))
    classes = classes_of(str(args.source), shards.labels, renumber=args.renumber)
    labels = np.searchsorted(classes, shards.labels)
    order = np.argsort(labels, kind="stable")
    size = declared_size(next(shards.images(order[:1].tolist())))

    def images() -> Iterator[tuple[int, bytes]]:
        for sample, image in zip(order.tolist(), shards.images(order.tolist()), strict=True):
            if (found := declared_size(image)) != size:
                raise DataError(
                    f"{args.source}: image {sample}: expected {size[0]}x{size[1]} pixels as the first one has, found "
                    f"{found[0]}x{found[1]}"
                )
            yield int(labels[sample]), image

    count = write_set(
        args.out,
        shown(images(), "images", len(order), console),
        num_classes=len(classes),
        image_size=size,
        texts=origins_text(classes) if args.renumber else {},
        force=args.force,
    )
    print(f"{args.out}: {count} images of {len(classes)} identities from {len(shards.paths)} shards")
