"""`python -m training plan`: memory, time and cost of a run on machines that nobody has rented yet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from configs.load import load_config
from configs.schema import ConfigError, RunConfig
from data.commands.arguments import CORES, whole
from training.checks import open_records
from training.plan import machine, show
from training.plan.advice import advise
from training.plan.devices import NAMES, device_of
from training.plan.links import BETWEEN, link_of
from training.plan.planner import Dataset, Scenario, make_plan
from training.plan.work import Resource

_IMAGES_EACH = 20
"""Of an identity, where nobody says how many: WebFace42M has 21."""
_SHORT = {
    "backbone": "model.backbone",
    "batch": "train.batch_size",
    "epochs": "train.epochs",
    "sample_rate": "head.sample_rate",
}
"""Options that are settings."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        help="memory, time and cost of a run before machines are rented",
        description="Plans what train_dist.py would run with the same --config and --set. Trains nothing. Exit code 0: "
        "it fits; 1: it does not; 2: wrong arguments or settings. docs/planning.md says what each number rests on.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe, one of configs/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="as of train_dist.py; many times"
    )
    parser.add_argument("--identities", type=_number, metavar="C", help="such as 29e6; without: of data.path's records")
    parser.add_argument("--images", type=_number, metavar="N", help=f"default {_IMAGES_EACH} of each identity")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"one of {', '.join(NAMES)}; default H100")
    parser.add_argument("--gpus", type=whole(1), default=8, metavar="N", help="ranks of all hosts; default 8")
    parser.add_argument("--per-host", type=whole(1), default=8, metavar="N", help="ranks of a host; default 8")
    parser.add_argument(
        "--network",
        metavar="NAME",
        help=f"between hosts: one of {', '.join(BETWEEN)}; default: as the GPU's hosts have",
    )
    parser.add_argument("--cores", type=whole(1), default=0, metavar="N", help="of a host; default: no limit")
    parser.add_argument("--backbone", metavar="NAME", help="model.backbone")
    parser.add_argument("--batch", type=whole(2), metavar="B", help="train.batch_size")
    parser.add_argument("--epochs", type=whole(1), metavar="E", help="train.epochs")
    parser.add_argument("--sample-rate", type=float, metavar="R", help="head.sample_rate")
    parser.add_argument("--price-per-gpu-hour", type=_price, default=0.0, metavar="P", help="in any currency")
    parser.add_argument("--json", action="store_true", help="everything, to standard output, for machines")
    parser.set_defaults(run=run)


def _number(text: str) -> int:
    """29e6, 42_474_557 and the like. argparse shows ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 2 <= value < 1e12 or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number from 2 to 1e12, such as 29e6, got {text!r}")
    return int(value)


def _price(text: str) -> float:
    """argparse shows ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a price of 0 or more, got {text!r}")
    return value


def run(args: argparse.Namespace, console: Console) -> int:
    """0: it fits, 1: it does not. Raises ConfigError or DataError."""
    scenario = scenario_of(args, console)
    plan = make_plan(scenario)
    advices = advise(scenario, plan)
    if args.json:
        print(show.as_json(scenario, plan, advices, args.price_per_gpu_hour))
    else:
        show.tell(Console(), scenario, plan, advices, args.price_per_gpu_hour)
    return int(not plan.fits)


def scenario_of(args: argparse.Namespace, console: Console) -> Scenario:
    """What the arguments ask for. Raises ConfigError or DataError."""
    short = [f"{name}={getattr(args, key)}" for key, name in _SHORT.items() if getattr(args, key) is not None]
    device = device_of(args.gpu)
    config = load_config(args.config, [*short, *args.set])
    if config.train.device == "cpu" and device.cuda:
        raise ConfigError(f"train.device: expected auto or cuda with --gpu {device.name}, got cpu: use --gpu cpu")
    network = link_of(args.network or device.network, BETWEEN, "--network")
    return Scenario(
        config=config,
        dataset=_dataset(args, config),
        ranks=args.gpus,
        per_host=args.per_host,
        device=device,
        network=network,
        cores=args.cores,
        reference=None if device.cuda else _reference(config, min(args.per_host, args.gpus), console),
    )


def _dataset(args: argparse.Namespace, config: RunConfig) -> Dataset:
    if args.identities is not None:
        samples = args.images or _IMAGES_EACH * args.identities
        if samples < args.identities:
            raise ConfigError(f"--images: expected one of each identity at least, got {samples} of {args.identities}")
        return Dataset(classes=args.identities, samples=samples, guessed=args.images is None)
    if args.images is not None:
        raise ConfigError(f"--images: expected --identities as well, got {args.images} alone: records say both")
    if not config.data.path:
        raise ConfigError(
            "--identities: expected how many, such as 29e6, or the records by --set data.path=…, got nothing"
        )
    records = open_records(config.data)
    return Dataset(classes=records.num_classes, samples=records.num_samples, labels=records.labels)


def _reference(config: RunConfig, per_host: int, console: Console) -> dict[Resource, float]:
    """This machine's CPU, with the threads that a rank would have."""
    torch.set_num_threads(config.train.cpu_threads or max(1, CORES // per_host))
    with console.status("measuring this machine"):  # nothing, but on terminals
        return machine.measure()
