"""How fast is the streaming head, and how much memory does it need, against a dense one with plain autograd?

Three heads do the same work on the same weights, in one process, in turns: the dense head, the streaming head over all
class centres, and the streaming head over a sampled share of them with its row-sparse optimizer. Medians over several
turns after a warm-up. Quote the ratios: times of different machines, or of different runs, do not compare.

Legend: B rows of the batch, D embedding size, C classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.memory import peak_extra
from benchmarks.report import facts, markdown_table
from configs.schema import ConfigError, HeadConfig, TrainConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from partial_fc.reference import dense_margin_softmax
from training.distributed import Ranks, open_ranks
from training.timing import Stopwatch

DENSE, STREAMING, SAMPLED = ARMS = ("dense", "streaming", "sampled")
_LR, _MOMENTUM, _DECAY = 0.01, 0.9, 5e-4
_HEADER = (
    "classes",
    "head",
    "fwd+bwd ms",
    "step ms",
    "range ms",
    "speed / dense",
    "speed / all",
    "peak MB",
    "MB / dense",
)
_RANGE = _HEADER.index("range ms")
_LEGEND = {
    "speed": "steps of this head in the time of one step of the dense head, of the one over all classes",
    "peak MB": "memory of a step at its peak, beyond weights, momentum and batch",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Figures of one head at one number of classes. Times in seconds, one for each turn; memory in bytes."""

    classes: int
    arm: str
    learn: tuple[float, ...] = ()
    """Forward and backward."""
    step: tuple[float, ...] = ()
    """Forward, backward and optimizer."""
    extra: int | None = None
    """Peak of a step beyond weights, momentum and batch; None: not measured."""
    skipped: str = ""
    """Why there are no figures."""


class Problem:
    """Weights, a batch and the optimizers; every head works on the same ones."""

    def __init__(self, classes: int, args: argparse.Namespace, ranks: Ranks) -> None:
        self.ranks, self.rate = ranks, args.sample_rate
        self.bf16 = ranks.device.type == "cuda"
        self.head = PartialFCHead(
            num_classes=classes,
            embedding_size=args.dim,
            config=HeadConfig(),
            group=ranks.group,
            seed=args.seed,
            product_dtype=torch.bfloat16 if self.bf16 else torch.float32,
        ).to(ranks.device)
        generator = torch.Generator().manual_seed(args.seed)
        x_BD = F.normalize(torch.randn(args.batch, args.dim, generator=generator)).to(ranks.device)
        self.x_BD = x_BD.requires_grad_()
        self.labels_B = torch.randint(0, classes, (args.batch,), generator=generator).to(ranks.device)
        self.margins_C = torch.full((classes,), self.head.config.margin, device=ranks.device)
        weights = [self.head.weight]
        dense_sgd = torch.optim.SGD(weights, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY)
        centre_sgd = CentreSGD(weights, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            DENSE: dense_sgd,
            STREAMING: centre_sgd,
            SAMPLED: centre_sgd,
        }

    def loss(self, arm: str, turn: int) -> Tensor:
        if arm == DENSE:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.bf16):
                return dense_margin_softmax(
                    self.x_BD, self.head.weight, self.labels_B, self.margins_C, scale=self.head.config.scale
                )
        rate = self.rate if arm == SAMPLED else 1.0
        self.head.config = dataclasses.replace(self.head.config, sample_rate=rate)
        ids_B = torch.arange(len(self.x_BD), device=self.ranks.device)
        loss: Tensor = self.head(gather_batch(self.x_BD, self.labels_B, ids_B, self.ranks.group), step=turn)
        return loss

    def step(self, arm: str, turn: int) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer. Gradients are gone when it begins and when it ends."""
        learn, update = Stopwatch(self.ranks.device), Stopwatch(self.ranks.device)
        with learn:
            self.loss(arm, turn).backward()
        with update:
            self.optimizers[arm].step()
        seconds = learn.take(), update.take()
        self.head.weight.grad = self.x_BD.grad = None
        return seconds

    @torch.no_grad()
    def check(self) -> None:
        """The dense and the streaming head must mean the same loss, or their times say nothing."""
        dense, streaming = (self.loss(arm, 0).item() for arm in (DENSE, STREAMING))
        if not abs(dense - streaming) <= (0.05 if self.bf16 else 1e-4) * abs(dense):
            raise RuntimeError(f"dense and streaming head disagree: loss {dense} against {streaming}")


def dense_bytes(classes: int, batch: int, dim: int) -> int:
    """What a process with all heads holds at the peak of the dense one, fp32: measured on CPUs, rounded up.

    Weights, two momenta, and four arrays (C, D) and four (B, C) of the step.
    """
    return 4 * classes * (7 * dim + 4 * batch)


def why_no_dense(classes: int, args: argparse.Namespace, device: torch.device) -> str:
    """Empty when the dense head fits."""
    limit = args.memory_limit * 1e9
    if not limit:
        limit = 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    need = dense_bytes(classes, args.batch, args.dim)
    return f"it needs {need / 1e9:.2g} GB, the limit is {limit / 1e9:.2g} GB" if need > limit else ""


def measure(classes: int, args: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """A row for each head. Memory first, in processes of their own; then times, in turns."""
    skipped = why_no_dense(classes, args, ranks.device)
    arms = ARMS[1:] if skipped else ARMS
    extra = {arm: _extra_in_own_process(arm, classes, args) for arm in arms}
    problem = Problem(classes, args, ranks)
    if DENSE in arms:
        problem.check()
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for turn in range(-args.warmup, args.repeats):
        first = turn % len(arms)  # nobody always comes first
        for arm in (*arms[first:], *arms[:first]):
            seconds = problem.step(arm, args.warmup + turn)
            if turn >= 0:
                times[arm].append(seconds)
    rows = [Row(classes, DENSE, skipped=skipped)] if skipped else []
    for arm, pairs in times.items():
        learn, step = tuple(pair[0] for pair in pairs), tuple(sum(pair) for pair in pairs)
        rows.append(Row(classes, arm, learn, step, extra[arm]))
    return rows


def _extra_in_own_process(arm: str, classes: int, args: argparse.Namespace) -> int | None:
    options = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("batch", "dim", "sample_rate", "device", "threads", "seed")
    ]
    command = [sys.executable, "-m", "benchmarks.head", f"--memory-of={arm}", f"--classes={classes}", *options]
    child = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if child.returncode:
        raise RuntimeError(f"memory of the {arm} head at {classes} classes: exit code {child.returncode}; see above")
    return int(child.stdout) if child.stdout.strip().isdigit() else None


def _print_extra(arm: str, args: argparse.Namespace, ranks: Ranks) -> None:
    problem = Problem(args.classes[0], args, ranks)
    problem.step(arm, 0)  # makes the momentum, loads what is loaded at first use
    extra = peak_extra(lambda: problem.step(arm, 1) and None, ranks.device)
    print("unknown" if extra is None else extra)


def cells(row: Row, rows: Sequence[Row], rate: float) -> tuple[str, ...]:
    """The texts of a row, as _HEADER names them; ratios to the other heads at the same number of classes."""
    name = {DENSE: "dense", STREAMING: "all classes", SAMPLED: f"rate {rate:g}"}[row.arm]
    if row.skipped:
        return (f"{row.classes:,}", name, "skipped", *["-"] * (len(_HEADER) - 3))
    same = {other.arm: other for other in rows if other.classes == row.classes}
    dense, full = same[DENSE], same[STREAMING]
    step = statistics.median(row.step)
    return (
        f"{row.classes:,}",
        name,
        _digits(1000 * statistics.median(row.learn)),
        _digits(1000 * step),
        f"{_digits(1000 * min(row.step))} … {_digits(1000 * max(row.step))}",
        f"{statistics.median(dense.step) / step:.2f}" if dense.step else "-",
        f"{statistics.median(full.step) / step:.2f}",
        "-" if row.extra is None else _digits(row.extra / 1e6),
        f"{row.extra / dense.extra:.3f}" if row.extra is not None and dense.extra else "-",
    )


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 93_431, 360_232], metavar="C")
    parser.add_argument("--batch", type=int, default=128, help="rows of the batch, default 128")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--sample-rate", type=float, default=0.1, help="of the sampled head, default 0.1")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each head, default 3")
    parser.add_argument("--warmup", type=int, default=1, help="turns before those, default 1")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cuda: products in bf16")
    parser.add_argument("--threads", type=int, default=0, help="for arithmetic on the CPU, default all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory-limit", type=float, default=0.0, metavar="GB",
        help="leave the dense head out above this; default 8 on CPUs, 90%% of what is free on a GPU",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.batch, args.repeats, args.dim - 1, *(classes - 1 for classes in args.classes)) < 1 or args.warmup < 0:
        parser.error(
            "expected --batch and --repeats of at least 1, --dim and --classes of at least 2, --warmup 0 or more"
        )
    try:
        HeadConfig(sample_rate=args.sample_rate)
        with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
            if args.memory_of:
                _print_extra(args.memory_of, args, ranks)
            else:
                _compare(args, ranks, facts(ranks.device, "benchmarks.head", arguments))
    except ConfigError as error:
        parser.error(str(error))
    return 0


def _compare(args: argparse.Namespace, ranks: Ranks, about: dict[str, str]) -> None:
    rows = [row for classes in args.classes for row in measure(classes, args, ranks)]
    for row in rows:
        if row.skipped:
            about[f"dense head at {row.classes:,} classes"] = f"left out: {row.skipped}"
    products = "bf16 products, fp32 sums" if ranks.device.type == "cuda" else "fp32"
    about["work"] = (
        f"B = {args.batch}, D = {args.dim}, ArcFace, {products}, SGD with momentum, 1 rank; median of {args.repeats} "
        f"turns after {args.warmup} of warm-up, the heads alternating"
    )
    about |= _LEGEND
    texts = [cells(row, rows, args.sample_rate) for row in rows]
    table = Table(title="Head of the margin softmax: one step", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(_HEADER):
        if number != _RANGE:
            table.add_column(name, justify="left" if number == 1 else "right", no_wrap=number == 1)
    for text, row in zip(texts, rows, strict=True):
        table.add_row(*text[:_RANGE], *text[_RANGE + 1 :], end_section=row.arm == SAMPLED)
    console = Console()
    console.print(table)
    for name, value in about.items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if args.out is not None:
        lines = "".join(f"- {name}: {value}\n" for name, value in about.items())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            f"# Head of the margin softmax: one step\n\n{lines}\n{markdown_table(_HEADER, texts)}", encoding="utf-8"
        )
        console.print(f"written to {args.out}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
