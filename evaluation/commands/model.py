"""Which backbone and weights a command line asks for."""

from __future__ import annotations

import argparse
from pathlib import Path

from backbones import names
from configs.load import read_section, read_yaml
from configs.schema import ConfigError, ModelConfig
from evaluation.embed.records import EmbedError


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that choose a model and how it is run."""
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a training's output: its config.yaml and weights")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="backbone.pt")
    parser.add_argument("--backbone", metavar="NAME", help=f"without --run: {', '.join(names())}, timm/…")
    parser.add_argument("--embedding-size", type=_whole, default=512, help="without --run; default 512")
    parser.add_argument("--batch-size", type=_whole, default=128, help="images at a time, default 128")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")


def chosen_model(args: argparse.Namespace, *, example: str) -> tuple[ModelConfig, Path]:
    """Backbone and weights, of a run's folder or as the arguments say. Raises ConfigError, EmbedError."""
    if args.run is not None:
        return _model_of(args.run / "config.yaml"), args.weights or args.run / "backbone.pt"
    if args.weights is None or args.backbone is None:
        raise EmbedError(f"expected --run FOLDER, or --weights and --backbone, for example: {example}")
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
