"""`python -m data pack`: its sources and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data.commands.arguments import CORES, Parser, fraction, whole
from data.commands.packing import Options, pack_set
from data.commands.plans import HeldOut, Labelled, Plan, Training, Verification, folder_set, labelled_set, synthetic_set
from data.errors import DataError
from data.files import find_all, identified
from data.making.lst import COLUMNS, ListSource, read_list
from data.making.parquet import Table, jumps, read_table
from data.making.partial import SPILL
from data.making.sources import RESIZE_RULE
from data.making.spill import SpilledSource, files_of
from data.making.webdataset import Shards, ShardSource
from data.synthetic import DIFFICULTY_SPREAD


def add(commands: Any) -> None:
    """Register the command."""
    pack = commands.add_parser("pack", help="write train.rec, train.idx, property and verification.bin")
    sources = pack.add_subparsers(required=True, metavar="SOURCE", parser_class=Parser)
    _add_synthetic(sources)

    folder = sources.add_parser("folder", help="a subfolder of images for each identity", description=RESIZE_RULE)
    folder.add_argument("source", type=Path, metavar="FOLDER")
    _common(folder, _folder)

    lst = sources.add_parser("lst", help="image files named in a list, with their labels", description=RESIZE_RULE)
    lst.add_argument("source", type=Path, metavar="FILE.lst")
    lst.add_argument("--root", type=Path, required=True, metavar="FOLDER", help="where the paths in the list begin")
    about = "; ".join(f"{name}: {what}" for name, what in COLUMNS.items())
    lst.add_argument("--columns", choices=COLUMNS, help=f"{about}; default: the one that alone fits every line")
    _renumber(lst)
    _common(lst, _lst)

    parquet = sources.add_parser("parquet", help="parquet files with images and labels", description=RESIZE_RULE)
    parquet.add_argument("source", type=Path, nargs="+", metavar="FILE_OR_FOLDER")
    about = "encoded images, or a struct with such `bytes`; default image"
    parquet.add_argument("--image-column", default="image", metavar="NAME", help=about)
    about = "integers, or strings, whose sorted order makes the classes; default label"
    parquet.add_argument("--label-column", default="label", metavar="NAME", help=about)
    _renumber(parquet)
    _common(parquet, _parquet)

    about = "tar files of <key>.jpg or .png and <key>.cls"
    shards = sources.add_parser("webdataset", help=about, description=RESIZE_RULE)
    shards.add_argument("source", type=Path, nargs="+", metavar="TAR_OR_FOLDER")
    _renumber(shards)
    _common(shards, _webdataset)


def verification_of(args: argparse.Namespace) -> Verification:
    """What the arguments say about it."""
    return Verification(args.verification_identities, args.pairs, args.seed)


def add_pairs(parser: argparse.ArgumentParser, *, pairs: int) -> None:
    """Arguments of all that makes a verification set."""
    parser.add_argument("--seed", type=whole(0), default=0, help="default 0")
    parser.add_argument("--pairs", type=whole(10), default=pairs, help=f"pairs to verify, default {pairs}")
    parser.add_argument("--workers", type=whole(1), default=CORES, help=f"processes, default {CORES} here")
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _add_synthetic(sources: Any) -> None:
    synthetic = sources.add_parser("synthetic", help="faces that are drawn, the same for the same arguments")
    synthetic.add_argument("--identities", type=whole(2), default=1000, help="default 1000")
    synthetic.add_argument("--images-per-identity", type=whole(1), default=20, help="default 20")
    synthetic.add_argument("--label-noise", type=fraction, default=0.0, help="share of wrong labels, default 0")
    synthetic.add_argument(
        "--long-tail", type=fraction, default=0.0, help="0: all have as many (default), to 1: some a 20th of it"
    )
    synthetic.add_argument(
        "--difficulty-spread",
        type=fraction,
        default=DIFFICULTY_SPREAD,
        help=f"0: all persons alike, to 1: from studio portraits to blurred and covered; default {DIFFICULTY_SPREAD}",
    )
    synthetic.set_defaults(skip_bad=False)
    _shared(synthetic, _synthetic, held_out=100)


def _common(parser: argparse.ArgumentParser, plan: Any) -> None:
    parser.add_argument("--skip-bad", action="store_true", help="name images that do not decode and leave them out")
    _shared(parser, plan, held_out=0)


def _renumber(parser: argparse.ArgumentParser) -> None:
    about = "number the classes anew from 0; labels.csv says what they were"
    parser.add_argument("--renumber", action="store_true", help=about)


def _shared(parser: argparse.ArgumentParser, plan: Any, *, held_out: int) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    about = f"not trained on, for verification.bin; 0: none; default {held_out}"
    parser.add_argument("--verification-identities", type=whole(0), default=held_out, help=about)
    add_pairs(parser, pairs=2000)
    parser.set_defaults(run=_run, plan=plan)


def _run(args: argparse.Namespace, console: Console) -> None:
    training, held_out = args.plan(args)
    pack_set(args.out, training, held_out, Options(args.workers, args.force, args.skip_bad), console)


def _synthetic(args: argparse.Namespace) -> Plan:
    return synthetic_set(
        identities=args.identities,
        images_per_identity=args.images_per_identity,
        label_noise=args.label_noise,
        long_tail=args.long_tail,
        difficulty_spread=args.difficulty_spread,
        verification=verification_of(args),
    )


def _folder(args: argparse.Namespace) -> Plan:
    return folder_set(args.source, verification_of(args))


def _lst(args: argparse.Namespace) -> Plan:
    if not args.root.is_dir():
        raise DataError(f"{args.root}: expected the folder where the paths of {args.source} begin")
    source = ListSource(path=args.source, root=args.root, identity=identified([args.source]))  # before it is read
    listed = read_list(args.source, args.columns)
    images = Labelled(str(args.source), source, listed.rows, listed.labels)
    return labelled_set(images, verification_of(args), renumber=args.renumber)


def _webdataset(args: argparse.Namespace) -> Plan:
    paths = find_all(args.source, ".tar")
    source = ShardSource(paths=paths, identity=identified(paths))  # before they are read
    shards = Shards(paths)
    images = Labelled(str(args.source[0]), source, shards.rows, shards.labels)
    return labelled_set(images, verification_of(args), renumber=args.renumber)


def _parquet(args: argparse.Namespace) -> Plan:
    paths = find_all(args.source, ".parquet")
    table = read_table(paths, image_column=args.image_column, label_column=args.label_column)
    samples = np.arange(len(table.rows))[:, None]
    images = Labelled(str(args.source[0]), table.source, samples, table.labels, table.names)
    training, held_out = labelled_set(images, verification_of(args), renumber=args.renumber)
    if jumps(table.rows[training.wanted[:, 0]]) > 2 * table.groups:
        return _set_aside(table, training, args.out / SPILL, held_out)
    if held_out is not None:
        held_out = held_out.at(table.rows)
    return training._replace(wanted=table.rows[training.wanted[:, 0]]), held_out


def _set_aside(table: Table, training: Training, folder: Path, held_out: HeldOut | None) -> Plan:
    """Of a table whose labels are mixed, read once from front to back before anything is packed."""
    source = SpilledSource(folder=folder, origin=table.source)
    file_N = files_of(training.wanted[:, 0], len(table.rows))
    rows = np.concatenate([np.arange(len(table.rows))[:, None], table.rows], axis=1)
    training = training._replace(
        source=source,
        wanted=rows[training.wanted[:, 0]],
        prepare=lambda say: source.fill(table.rows, file_N, say),
    )
    return training, None if held_out is None else held_out.at(rows)._replace(source=source)
