"""What does the cluster service cost a training step?

One thread; times are those that it computed, so that what else a machine does counts little.

(a) The demo's training, all cluster terms on against `clustering.enabled=false`: two trainings in one process that take
    each step in turns on the same batch.
(b) The proportions of configs/ms1mv3_r50.yaml from measured parts: what one core takes for an image of iResNet-50, for
    a product of batch and class centres (without their gradient), and for each part of the service, times how often a
    step needs it.

Legend: B images of one rank, N rows of the global batch, D embedding size, C classes, K clusters, P samples of a rank.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.clusters.service_demo import UNTIMED, demo_times
from benchmarks.clusters.service_parts import Part, measure_parts
from benchmarks.measuring.report import facts, publish
from configs.schema import ConfigError, TrainConfig
from training.demo import SMALL, DemoError, Size, pack
from training.distributed import open_ranks

_TITLE = "Cluster service: its share of a training step"
HEADER = ("what", "arm", "mean ms", "median ms", "largest ms", "largest / median", "against training without")


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts of a training over several ranks; those of MS1MV3 unless given."""

    images: int = 5_179_510
    classes: int = 93_431
    batch: int = 128
    ranks: int = 8
    dim: int = 512
    extra: float = 0.15
    iterations: int = 3
    epochs: int = 20

    @property
    def clusters(self) -> int:
        return self.classes + round(self.extra * self.classes)

    @property
    def steps(self) -> int:
        """Of an epoch, in which there is one refresh."""
        return self.images // (self.batch * self.ranks)


def how_often(shape: Shape) -> dict[str, float]:
    """Units of each part that a step needs on one rank; slices of a refresh as the mean over an epoch's steps."""
    rows, samples = shape.batch * shape.ranks, shape.images / shape.ranks
    return {
        "backbone": shape.batch,
        "head": rows * shape.classes / shape.ranks,
        "assign": shape.iterations * samples * shape.clusters / shape.steps,
        "gate and seed": shape.iterations * samples / shape.steps,
        "mean": (shape.iterations + 1 / shape.epochs) * samples / shape.steps,  # once more at the very first
        "publication": samples / shape.steps,
        "bank and centres": rows,
        "row margins": rows,
        "contrastive": rows * shape.clusters / shape.ranks,
        "alignment": rows,
    }


def step_rows(what: str, seconds: Mapping[str, Sequence[float]], places: int = 1) -> list[tuple[str, ...]]:
    """A row for each arm, as HEADER names them; the first arm is training without clusters. seconds: of each step."""
    rows: list[tuple[str, ...]] = []
    plain = statistics.fmean(next(iter(seconds.values())))
    for arm, times in seconds.items():
        mean, median, largest = statistics.fmean(times), statistics.median(times), max(times)
        figures = (f"{1000 * value:.{places}f}" for value in (mean, median, largest))
        rows.append((what, arm, *figures, f"{largest / median:.2f}", f"{100 * (mean / plain - 1):+.1f}%"))
    return rows


def _part_rows(parts: dict[str, Part], shape: Shape) -> tuple[list[tuple[str, ...]], str]:
    """A row for each part, and the share of the service in the rest of the step."""
    rows: list[tuple[str, ...]] = []
    seconds = {}
    for name, often in how_often(shape).items():
        part = parts[name]
        seconds[name] = part.seconds * often
        rows.append(("ms1mv3_r50, a step", f"{name}: {often:.4g} x {1e9 * part.seconds:.4g} ns ({part.unit})",
                     f"{1000 * seconds[name]:.1f}", "", "", "", ""))  # fmt: skip
    training = seconds["backbone"] + seconds["head"]
    service = sum(seconds.values()) - training
    rows = [(*row[:-1], f"{100 * seconds[name] / training:+.2f}%") for row, name in zip(rows, seconds, strict=True)]
    share = 100 * service / training
    return rows, f"a step: {service:.3g} s of service to {training:.3g} s of backbone and head, {share:.2f}%"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=4, help="of the demo, default 4: all but the first two are timed")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="the demo's records, made if missing")
    parser.add_argument("--small", action="store_true", help="a few seconds of it, on small records")
    parser.add_argument("--only", choices=["demo", "parts"], help="one of the two questions")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.epochs <= UNTIMED:
        parser.error(f"expected --epochs of at least {UNTIMED + 1}, got {args.epochs}")
    try:
        if args.only != "parts":
            pack(args.data, SMALL if args.small else Size())
        with open_ranks(TrainConfig(device="cpu", cpu_threads=1)) as ranks:
            about = facts(ranks.device, "benchmarks.service", arguments)
            rows: list[tuple[str, ...]] = []
            data: list[dict[str, object]] = []
            if args.only != "parts":
                with tempfile.TemporaryDirectory() as folder:
                    times = demo_times(args.data, Path(folder), args.epochs, ranks, small=args.small)
                arms = {"plain": times.plain, "clusters": times.clusters}
                rows += step_rows("demo, a step", arms)
                data.append({**arms})
                about["demo"] = times.words
            if args.only != "demo":
                shape = Shape()
                parts = measure_parts(ranks, dim=shape.dim, small=args.small)
                part_rows, about["ms1mv3_r50"] = _part_rows(parts, shape)
                rows += part_rows
                about["counts"] = (
                    f"{shape.images:,} images of {shape.classes:,} identities, {shape.clusters:,} clusters, "
                    f"{shape.ranks} ranks x {shape.batch} images, {shape.steps} steps an epoch, a refresh of "
                    f"{shape.iterations} iterations in each; collectives are left out on both sides"
                )
                data.append({name: part.seconds for name, part in parts.items()})
    except (ConfigError, DemoError) as error:
        parser.error(str(error))
    publish(_TITLE, HEADER, rows, about=about, rows=data, out=args.out)
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
