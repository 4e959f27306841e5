"""Embed a record set with a trained backbone; evaluate backbones and embeddings; compare runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.schema import ConfigError, TrainConfig
from data.commands.arguments import Parser
from data.errors import DataError
from data.places import where
from data.records import RecordSet
from evaluation.commands.compare import add as add_compare
from evaluation.commands.identification import add as add_identification
from evaluation.commands.ijb import add as add_ijb
from evaluation.commands.model import add_model, chosen_model
from evaluation.commands.verify import add as add_verify
from evaluation.commands.verify import verify_sets
from evaluation.embed_records import EmbedError, embed_records, load_backbone
from sharding import shard_of
from training.distributed import Ranks, open_ranks

_EXAMPLE = "python -m evaluation embed --run runs/demo/run --records runs/demo/data --out embeddings.npy"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when arguments, weights or data are not as expected (one line says what), 130 if interrupted."""
    args = _parser().parse_args(arguments)
    console = Console(stderr=True)
    ranks: Ranks | None = None
    try:
        if args.run_alone is not None:
            args.run_alone(args, console)
            return 0
        train = TrainConfig(device=args.device, precision="fp32")
        with open_ranks(train) as ranks:
            args.run_ranks(args, ranks, console)
    except (ConfigError, DataError, EmbedError) as error:
        if ranks is None or ranks.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _embed(args: argparse.Namespace, ranks: Ranks, console: Console) -> None:
    model, weights = chosen_model(args, example=_EXAMPLE)
    if args.out.exists() and not args.force:
        raise EmbedError(f"{args.out}: expected no file there: name another, or replace it with --force")
    records = RecordSet.open(args.records)
    backbone = load_backbone(model.backbone, embedding_size=model.embedding_size, weights=weights).to(ranks.device)
    mine = shard_of(ranks.rank, ranks.world_size, records.num_samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = ranks.is_main and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task("images", total=mine.size)
        done = embed_records(
            backbone,
            records,
            args.out,
            batch_size=args.batch_size,
            threads=max(1, len(os.sched_getaffinity(0)) // ranks.world_size),
            dtype=args.dtype,
            group=ranks.group,
            progress=lambda images: progress.advance(task, images),
        )
    if ranks.is_main:
        print(f"{args.out}: {records.num_samples} embeddings of {model.embedding_size} components, {args.dtype}")
        if done.bad:
            print(f"{done.bad} images do not decode: their rows are zero")
        if done.not_finite:
            print(f"{done.not_finite} embeddings were not finite: their rows are zero; has the training diverged?")


def _verify(args: argparse.Namespace, ranks: Ranks, console: Console) -> None:
    verify_sets(args, device=ranks.device, group=ranks.group, is_main=ranks.is_main, console=console)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    embed = commands.add_parser(
        "embed",
        help="embeddings of a record set, row i of sample i",
        description="Under torchrun each rank embeds its part: torchrun --nproc_per_node=8 -m -- evaluation embed … "
        "(without the -- torchrun takes --run for its own).",
        epilog=f"Example: {_EXAMPLE}",
    )
    add_model(embed)
    embed.add_argument("--records", type=where, required=True, metavar="FOLDER")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE")
    embed.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default float16")
    embed.add_argument("--force", action="store_true", help="replace a file that is there")
    embed.set_defaults(run_ranks=_embed, run_alone=None)
    add_verify(commands).set_defaults(run_ranks=_verify, run_alone=None)
    for add in (add_ijb, add_identification, add_compare):
        add(commands)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
