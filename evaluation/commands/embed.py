"""`python -m evaluation embed`: embeddings of a record set, a folder of images or a verification set, on all ranks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from backbones import IMAGE_SIZE
from data.commands.arguments import progress_on
from data.errors import DataError
from data.making.sources import RESIZE_RULE
from data.rec.places import where
from data.rec.records import RecordSet
from evaluation.commands.model import add_model, chosen_model
from evaluation.embed.output import Output
from evaluation.embed.records import embed_all, load_backbone, rows_of
from evaluation.embed.sources import FolderImages, PairImages, RecordImages, Source

_EXAMPLE = "python -m evaluation embed --run runs/demo/run --records runs/demo/data --out embeddings.npy"


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "embed",
        help="embeddings of a record set, a folder of images or a verification set, row i of image i",
        description="Under torchrun each rank embeds its part: torchrun --nproc_per_node=8 -m -- evaluation embed … "
        f"(without the -- torchrun takes --run for its own). Of image files: {RESIZE_RULE.replace('packed', 'taken')}",
        epilog=f"Example: {_EXAMPLE}",
    )
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=where, metavar="FOLDER", help="a record set")
    about = "aligned faces, JPEG and PNG, or a subfolder of them for each identity"
    source.add_argument("--images", type=Path, metavar="FOLDER", help=about)
    source.add_argument("--bin", type=Path, metavar="SET.bin", help="a verification set: rows 2i and 2i + 1 are pair i")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PLACE",
        help="a .npy file, or a folder for one of each rank, which `clustering kmeans` reads as one; of --images also "
        "PLACE's name with .names.txt and .labels.npy: file and subfolder of each row",
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default float16")
    parser.add_argument(
        "--raw", action="store_true", help="leave rows the length they have, which `evaluation ijb` weighs images by"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser


def embed_set(
    args: argparse.Namespace,
    *,
    device: torch.device,
    group: dist.ProcessGroup,
    is_main: bool,
    console: Console,
) -> None:
    """Embed on all ranks; the main one prints. Collectives: those of `embed_all`.

    Raises DataError, EmbedError and ConfigError, on all ranks alike.
    """
    model, weights = chosen_model(args, example=_EXAMPLE)
    out = Output(args.out, force=args.force)
    source = _source(args)
    backbone = load_backbone(model.backbone, embedding_size=model.embedding_size, weights=weights).to(device)
    mine = rows_of(dist.get_rank(group), dist.get_world_size(group), len(source), args.batch_size)
    with progress_on(console) as progress:
        task = progress.add_task("images", total=len(mine), visible=is_main)
        done = embed_all(
            backbone,
            source,
            out,
            batch_size=args.batch_size,
            threads=torch.get_num_threads(),  # this rank's share of the host's cores
            dtype=args.dtype,
            raw=args.raw,
            group=group,
            progress=lambda images: progress.advance(task, images),
        )
    if not is_main:
        return
    print(f"{args.out}: {len(source)} embeddings of {model.embedding_size} components, {args.dtype}")
    if done.bad:
        more = f", the first {len(done.first_bad)} of them" if done.bad > len(done.first_bad) else ""
        print(f"{done.bad} images do not decode: their rows are zero{more}:")
        for row in done.first_bad:
            print(f"  row {row}: {_why(source, row)}")
    if done.not_finite:
        print(f"{done.not_finite} embeddings were not finite: their rows are zero; has the training diverged?")


def _source(args: argparse.Namespace) -> Source:
    if args.records is not None:
        return RecordImages(RecordSet.open(args.records))
    return FolderImages(args.images) if args.images is not None else PairImages(args.bin)


def _why(source: Source, row: int) -> str:
    try:
        source.decode(row, np.empty((*IMAGE_SIZE, 3), np.uint8))
    except DataError as error:
        return str(error)
    return "it could not be read then"
