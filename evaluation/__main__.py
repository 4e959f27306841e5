"""Embed a record set with a trained backbone."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backbones import names
from configs.load import read_section, read_yaml
from configs.schema import ConfigError, ModelConfig, TrainConfig
from data.commands.arguments import Parser
from data.errors import DataError
from data.places import where
from data.records import RecordSet
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
        train = TrainConfig(device=args.device, precision="fp32")
        with open_ranks(train) as ranks:
            _embed(args, ranks, console)
    except (ConfigError, DataError, EmbedError) as error:
        if ranks is None or ranks.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _embed(args: argparse.Namespace, ranks: Ranks, console: Console) -> None:
    model, weights = _model(args)
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


def _model(args: argparse.Namespace) -> tuple[ModelConfig, Path]:
    """Backbone and weights, of a run's folder or as the arguments say. Raises ConfigError, EmbedError."""
    if args.run is not None:
        return _model_of(args.run / "config.yaml"), args.weights or args.run / "backbone.pt"
    if args.weights is None or args.backbone is None:
        raise EmbedError(f"expected --run FOLDER, or --weights and --backbone, for example: {_EXAMPLE}")
    return ModelConfig(backbone=args.backbone, embedding_size=args.embedding_size), args.weights


def _model_of(path: Path) -> ModelConfig:
    """The section `model` of a run's settings; the others may be those of an older version. Raises ConfigError."""
    try:
        section = read_yaml(path).get("model")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror}): expected a training's output folder") from None
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: expected a section `model`: name --weights and --backbone instead")
    return read_section(ModelConfig, "model", section)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


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
    embed.add_argument("--run", type=Path, metavar="FOLDER", help="a training's output: its config.yaml and weights")
    embed.add_argument("--weights", type=Path, metavar="FILE", help="backbone.pt")
    embed.add_argument("--backbone", choices=names(), help="without --run")
    embed.add_argument("--embedding-size", type=_whole, default=512, help="without --run; default 512")
    embed.add_argument("--records", type=where, required=True, metavar="FOLDER")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE")
    embed.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default float16")
    embed.add_argument("--batch-size", type=_whole, default=128, help="images at a time, default 128")
    embed.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    embed.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is an interrupt: tidy up, then go
    sys.exit(main())
