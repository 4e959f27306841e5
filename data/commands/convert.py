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
from data.decode import declared_size
from data.errors import DataError
from data.places import Folder, is_address, where
from data.records import RecordSet
from data.rewrite import refuse_source, write_set
from data.webdataset import SHARD_IMAGES, Shards, find_shards, write_shards

_SHARD = re.compile(r"[0-9]{6}\.tar")
"""Names of ours: others' tar files are left alone."""
_MOST_EMPTY = 100
"""Times as many classes as images: more are numbers of another kind."""


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
    there = [path for path in find_shards(args.out) if _SHARD.fullmatch(path.name)] if _has_shards(args.out) else []
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


def _has_shards(folder: Path) -> bool:
    return folder.is_dir() and any(_SHARD.fullmatch(path.name) for path in folder.iterdir())


def _to_records(args: argparse.Namespace, console: Console) -> None:
    shards = Shards(find_shards(args.source))
    labels, texts = shards.labels, {}
    if args.renumber:
        used, labels = np.unique(labels, return_inverse=True)
        rows = "".join(f"{label},{old}\n" for label, old in enumerate(used.tolist()))
        texts["labels.csv"] = f"label,old_label\n{rows}"
    classes = int(labels.max()) + 1
    if classes > _MOST_EMPTY * len(labels):
        raise DataError(
            f"{args.source}: expected classes numbered from 0, found {classes - 1} among {len(labels)} images: number "
            "them anew with --renumber"
        )
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
        num_classes=classes,
        image_size=size,
        texts=texts,
        force=args.force,
    )
    print(f"{args.out}: {count} images of {classes} identities from {len(shards.paths)} shards")
