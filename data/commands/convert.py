"""`python -m data convert`: record sets to WebDataset shards and back."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data.commands.arguments import shown, whole
from data.decode import declared_size
from data.errors import DataError
from data.records import RecordSet
from data.rewrite import write_set
from data.webdataset import SHARD_IMAGES, Shards, find_shards, write_shards


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "convert",
        help="a set to WebDataset shards, or shards to a set",
        description="A folder with train.rec becomes tar files of <number>.jpg and <number>.cls; a folder of such "
        "tar files becomes a record set.",
    )
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    about = f"images of a shard, default {SHARD_IMAGES}"
    parser.add_argument("--shard-images", type=whole(1), default=SHARD_IMAGES, metavar="N", help=about)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    """0."""
    if args.out.resolve() == args.source.resolve():
        raise DataError(f"{args.out}: expected another folder than the source")
    if (args.source / "train.rec").is_file():
        _to_shards(args, console)
    else:
        _to_records(args, console)
    return 0


def _to_shards(args: argparse.Namespace, console: Console) -> None:
    records = RecordSet.open(args.source)
    there = sorted(args.out.glob("*.tar")) if args.out.is_dir() else []
    if there and not args.force:
        raise DataError(
            f"{args.out}: expected no shards there, found {there[0].name}: name another folder, or use --force"
        )
    images = ((label, bytes(image)) for label, image in map(records.image, range(records.num_samples)))
    partial = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shards = write_shards(
            partial, shown(images, "images", records.num_samples, console), per_shard=args.shard_images
        )
        args.out.mkdir(parents=True, exist_ok=True)
        for old in there:
            old.unlink()
        for shard in shards:
            shard.replace(args.out / shard.name)
    except OSError as error:
        raise DataError(f"{args.out}: cannot write there ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.out}: {records.num_samples} images of {records.num_classes} identities in {len(shards)} shards")


def _to_records(args: argparse.Namespace, console: Console) -> None:
    shards = Shards(find_shards(args.source))
    order = np.argsort(shards.labels, kind="stable")
    first = next(shards.images(order[:1].tolist()))
    images = zip(shards.labels[order].tolist(), shards.images(order.tolist()), strict=True)
    classes = int(shards.labels.max()) + 1
    count = write_set(
        args.out,
        shown(images, "images", len(order), console),
        num_classes=classes,
        image_size=declared_size(first),
        texts={},
        force=args.force,
    )
    print(f"{args.out}: {count} images of {classes} identities from {len(shards.paths)} shards")
