"""What does updating the class centres cost, by which optimizer, over how many of them?

Backward and the optimizer's step are timed together: ours makes the centres' gradient as it applies it, the others
find it in .grad. Torch's SGD and AdamW get a dense gradient and walk over every centre; SparseAdam gets the drawn rows'
alone, and so does CentreSGD with fused=False. A small batch keeps the matrix products short, so that what is left is
the walk over the centres. All work on the same centres, in turns; forward is not timed.

Legend: B rows of the batch, D embedding size, C classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring.options import check_sizes
from benchmarks.measuring.report import digits, facts, publish, spread
from configs.schema import ConfigError, HeadConfig, TrainConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreAdamW, CentreSGD
from training.distributed import Ranks, open_ranks
from training.showing.timing import Stopwatch

_TITLE = "Optimizers of the class centres: backward and step"
_HEADER = ("classes", "optimizer", "ms", "range ms", "speed")
_LR, _MOMENTUM, _BETAS, _DECAY = 0.01, 0.9, (0.9, 0.999), 5e-4

Parameters = list[nn.Parameter]


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer, and the kind of gradient that it gets."""

    name: str
    baseline: str
    """The dense one of its family."""
    make: Callable[[Parameters], torch.optim.Optimizer]
    sparse_gradient: bool = True
    """Where classes are sampled; over all of them gradients are dense."""
    sampled_only: bool = False


CONTENDERS = (
    Contender(
        "torch SGD",
        "torch SGD",
        lambda p: torch.optim.SGD(p, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY),
        sparse_gradient=False,
    ),
    Contender(
        "CentreSGD, .grad",
        "torch SGD",
        lambda p: CentreSGD(p, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY, fused=False),
    ),
    Contender("CentreSGD", "torch SGD", lambda p: CentreSGD(p, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY)),
    Contender(
        "torch AdamW",
        "torch AdamW",
        lambda p: torch.optim.AdamW(p, lr=_LR, betas=_BETAS, weight_decay=_DECAY),
        sparse_gradient=False,
    ),
    Contender(
        "torch SparseAdam", "torch AdamW", lambda p: torch.optim.SparseAdam(p, lr=_LR, betas=_BETAS), sampled_only=True
    ),
    Contender("CentreAdamW", "torch AdamW", lambda p: CentreAdamW(p, lr=_LR, betas=_BETAS, weight_decay=_DECAY)),
)


class Racer:
    """A contender with a head of its own, whose centres lie in memory that all share."""

    def __init__(self, contender: Contender, centres_CD: Tensor, *, seed: int, ranks: Ranks) -> None:
        self.contender, self.ranks = contender, ranks
        classes, dim = centres_CD.shape
        self.head = PartialFCHead(
            num_classes=classes,
            embedding_size=dim,
            config=HeadConfig(),
            group=ranks.group,
            seed=seed,
            product_dtype=torch.bfloat16 if ranks.device.type == "cuda" else torch.float32,
            sparse_gradient=contender.sparse_gradient,
        )
        self.head.weight = nn.Parameter(centres_CD)
        self.optimizer = contender.make([self.head.weight])

    def turn(self, x_BD: Tensor, labels_B: Tensor, rate: float, step: int) -> float:
        """Seconds of backward and step."""
        self.head.config = dataclasses.replace(self.head.config, sample_rate=rate)
        loss = self.head(gather_batch(x_BD, labels_B, labels_B, self.ranks.group), step=step)
        watch = Stopwatch(self.ranks.device)
        with watch:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return watch.take()


def measure(classes: int, rate: float, args: argparse.Namespace, ranks: Ranks) -> dict[str, list[float]]:
    """Seconds of each turn by the contender's name."""
    generator = torch.Generator().manual_seed(args.seed)
    centres_CD = torch.randn(classes, args.dim, generator=generator).to(ranks.device)
    x_BD = F.normalize(torch.randn(args.batch, args.dim, generator=generator)).to(ranks.device)
    labels_B = torch.randint(0, classes, (args.batch,), generator=generator).to(ranks.device)
    racers = [
        Racer(contender, centres_CD, seed=args.seed, ranks=ranks)
        for contender in CONTENDERS
        if rate < 1 or not contender.sampled_only
    ]
    times: dict[str, list[float]] = {racer.contender.name: [] for racer in racers}
    for turn in range(-args.warmup, args.repeats):
        first = turn % len(racers)  # nobody always comes first
        for racer in (*racers[first:], *racers[:first]):
            seconds = racer.turn(x_BD, labels_B, rate, turn + args.warmup)
            if turn >= 0:
                times[racer.contender.name].append(seconds)
    return times


def cells(classes: int, rate: float, name: str, times: dict[str, list[float]]) -> tuple[str, ...]:
    """The texts of a row, as _HEADER names them."""
    (contender,) = (contender for contender in CONTENDERS if contender.name == name)
    median, base = statistics.median(times[name]), statistics.median(times[contender.baseline])
    return (
        f"{classes:,}",
        name if rate == 1 else f"{name}, rate {rate:g}",
        digits(1000 * median),
        spread([1000 * seconds for seconds in times[name]]),
        f"{base / median:.2f}",
    )


def _compare(args: argparse.Namespace, arguments: Sequence[str], ranks: Ranks) -> None:
    about = facts(ranks.device, "benchmarks.optim", arguments)
    texts: list[tuple[str, ...]] = []
    rows: list[dict[str, Any]] = []
    for classes in args.classes:
        for rate in args.rates:
            times = measure(classes, rate, args, ranks)
            texts += [cells(classes, rate, name, times) for name in times]
            rows += [{"classes": classes, "rate": rate, "optimizer": name, "seconds": times[name]} for name in times]
    about["work"] = (
        f"B = {args.batch}, D = {args.dim}, 1 rank; backward of the head and step of the optimizer, without forward; "
        f"median of {args.repeats} turns after {args.warmup} of warm-up, the optimizers alternating"
    )
    about["speed"] = "turns in the time of one turn of torch's SGD or AdamW at the same rate"
    publish(_TITLE, _HEADER, texts, about=about, rows=rows, out=args.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optim", description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 93_431], metavar="C")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 0.1, 0.01], metavar="R", help="default 1 .1 .01"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows of the batch, default 16")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each optimizer, default 5")
    parser.add_argument("--warmup", type=int, default=1, help="turns before those, default 1")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="for arithmetic on the CPU, default all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    args = parser.parse_args(arguments)
    check_sizes(parser, args)
    try:
        with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
            _compare(args, arguments, ranks)
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
