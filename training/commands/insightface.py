"""`python -m training insightface`: weights of arcface_torch's runs, checked, joined, and trained on from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.load import load_config
from data.commands.arguments import Parser, whole
from training.checkpoint import CheckpointError
from training.warm.peer_weights import backbone_weights, heads_at, write_backbone, write_centres
from training.warm.warm_start import write_start


def add(commands: Any) -> None:
    """Adds the subcommand to a parser's."""
    parser = commands.add_parser("insightface", help="weights of arcface_torch: check, join, go on from them")
    what = parser.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)

    check = what.add_parser("check", help="which backbone a file's weights fit; they load as they are")
    check.add_argument("file", type=Path, metavar="FILE", help="model.pt, backbone.pth, checkpoint_gpu_0.pt")
    check.add_argument("--out", type=Path, metavar="FILE", help="write them alone, for `evaluation embed --weights`")
    check.set_defaults(run=_check)

    places = "folder of softmax_fc_gpu_*.pt, checkpoint_gpu_*.pt or rank_*_softmax_weight.pt, or these"
    centres = what.add_parser("centres", help="join the class centres of all ranks, by class")
    centres.add_argument("places", type=Path, nargs="+", metavar="PATH", help=places)
    centres.add_argument("--out", type=Path, required=True, metavar="FILE.npy")
    centres.set_defaults(run=_centres)

    start = what.add_parser("start", help="write a checkpoint of step 0 with them, which train_dist.py goes on from")
    start.add_argument("--config", type=Path, metavar="FILE")
    start.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    start.add_argument("--backbone", type=Path, required=True, metavar="FILE")
    start.add_argument("--heads", type=Path, nargs="+", metavar="PATH", help=f"{places}; without: new class centres")
    start.add_argument("--ranks", type=whole(1), default=1, metavar="N", help="of the run; default 1")
    start.set_defaults(run=_start)


def _check(args: argparse.Namespace, console: Console) -> int:
    weights = backbone_weights(args.file)
    numbers = sum(tensor.numel() for tensor in weights.tensors.values()) / 1e6
    line = (
        f"{args.file}: weights of {' or '.join(weights.backbones)}, {weights.embedding_size} components, "
        f"{numbers:.1f} million numbers"
    )
    if args.out is not None:
        write_backbone(weights, args.out)
        line += f"; written to {args.out}"
    elif not weights.bare:
        line += "; within another state: --out FILE writes them alone"
    print(line)
    return 0


def _centres(args: argparse.Namespace, console: Console) -> int:
    if args.out.suffix != ".npy":
        raise CheckpointError(f"--out: expected a name that ends with .npy, got {args.out}")
    heads = heads_at(args.places)
    write_centres(heads, args.out)
    print(f"{args.out}: {heads.num_classes} class centres of {heads.dim} components, of {len(heads.files)} rank(s)")
    return 0


def _start(args: argparse.Namespace, console: Console) -> int:
    config = load_config(args.config, args.set)
    weights = backbone_weights(args.backbone)
    heads = heads_at(args.heads) if args.heads else None
    address = write_start(config, ranks=args.ranks, weights=weights, heads=heads).address
    which = "new class centres" if heads is None else f"{heads.num_classes} class centres"
    print(f"{address}: {config.model.backbone} and {which}; train_dist.py goes on from it with the same settings")
    return 0
