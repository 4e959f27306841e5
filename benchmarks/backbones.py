"""What does each backbone cost: arithmetic, memory and time, against the same network trained in the plain manner?

Counted for every name: weights, FLOPs of an image forward (a multiplication and an addition are two), and bytes that an
image takes in training. Measured for some: images a second. The arms of a backbone take turns:

    plain      torch's DistributedDataParallel as it comes, images and weights contiguous
    ours       `training.distributed.data_parallel`, channels last
    recompute  as ours, every block computed again in backward (`model.recompute=1`)
    compiled   as ours, through torch.compile (`model.compile=true`); with --compile

Legend: B images of a batch, D embedding size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from backbones import IMAGE_SIZE, Backbone, build_backbone, names
from benchmarks.measuring.memory import peak_extra
from benchmarks.measuring.report import digits, facts, publish
from benchmarks.planning.activations import Bytes, bytes_per_image
from configs.schema import ConfigError, TrainConfig
from training.distributed import Ranks, data_parallel, open_ranks
from training.showing.flops import forward_flops
from training.showing.timing import Stopwatch

_TITLE = "Backbones: arithmetic, memory and time of an image"
HEADER = (
    *("backbone", "arm", "M weights", "GFLOPs", "published", "kept fp32 MB", "kept bf16 MB", "peak fp32 MB"),
    *("peak bf16 MB", "forward img/s", "step img/s", "step / plain", "measured MB"),
)
_ONLY_IN_FILE = ("published", "kept bf16 MB", "peak fp32 MB", "peak bf16 MB", "forward img/s", "measured MB")
PLAIN, OURS, AGAIN, COMPILED = ARMS = ("plain", "ours", "recompute", "compiled")
_SMALL = ("small", "mobilefacenet", "vit_t")
"""What a CPU is timed with unless told otherwise."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

PUBLISHED = {
    "iresnet18": 2.6,
    "iresnet50": 6.3,
    "iresnet100": 12.1,
    "iresnet200": 23.5,
    "mobilefacenet": 0.45,
    "vit_t": 1.5,
    "vit_s": 5.7,
    "vit_b": 11.4,
    "vit_l_dp005_mask_005": 25.3,
}
"""Multiplications with additions of an image, 10^9, as arcface_torch's README has them (deepinsight/insightface,
recognition/arcface_torch/README.md of commit 0159b24d, where the column is called FLOPs; of mobilefacenet by its name
there, mobilefacenet-0.45G)."""


class Arm:
    """One way to train a backbone."""

    def __init__(self, name: str, kind: str, args: argparse.Namespace, ranks: Ranks) -> None:
        self.kind, self.device = kind, ranks.device
        self.dtype = _DTYPES.get(args.precision)
        torch.manual_seed(0)
        self.backbone = build_backbone(name, embedding_size=args.dim, recompute=float(kind == AGAIN)).to(self.device)
        images_BHW3 = torch.rand(args.batch, *IMAGE_SIZE, 3, device=self.device) * 2 - 1
        self.images_B3HW = images_BHW3.permute(0, 3, 1, 2)  # as our loaders give them
        if kind == PLAIN:
            cuda = self.device.type == "cuda"
            self.images_B3HW = self.images_B3HW.contiguous()
            self.model = DistributedDataParallel(
                self.backbone, device_ids=[self.device] if cuda else None, process_group=ranks.group
            )
        else:
            self.model = data_parallel(self.backbone, ranks, compiled=kind == COMPILED)
        self.gradient_BD = torch.randn(args.batch, args.dim, device=self.device) / args.batch
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            embedding_BD = self.model(self.images_B3HW)
        embedding_BD.backward(self.gradient_BD)
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> None:
        """As an evaluation."""
        self.backbone.eval()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            self.backbone(self.images_B3HW)


def measure(name: str, args: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """Seconds of every turn of each arm, and on GPUs the bytes of a step."""
    kinds = ARMS if args.compile else ARMS[:-1]
    arms = [Arm(name, kind, args, ranks) for kind in kinds]
    forward: dict[str, list[float]] = {kind: [] for kind in kinds}
    step: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(-args.warmup, args.repeats):
        first = turn % len(arms)  # nobody always comes first
        for arm in (*arms[first:], *arms[:first]):
            for work, seconds in ((arm.step, step), (arm.forward, forward)):
                watch = Stopwatch(ranks.device)
                with watch:
                    work()
                if turn >= 0:
                    seconds[arm.kind].append(watch.take())
    cuda = ranks.device.type == "cuda"
    return [
        {
            "backbone": name,
            "arm": arm.kind,
            "forward seconds": forward[arm.kind],
            "step seconds": step[arm.kind],
            "bytes of a step": peak_extra(arm.step, ranks.device) if cuda else None,
        }
        for arm in arms
    ]


def _shapes(name: str, dim: int) -> Backbone:
    """A backbone without values. Raises ValueError."""
    with torch.device("meta"):
        return build_backbone(name, embedding_size=dim)


def count(name: str, dim: int) -> list[dict[str, Any]]:
    """Weights, FLOPs and bytes an image, as they are and with every block computed again."""
    backbone = _shapes(name, dim).to_empty(device="cpu").eval()  # which takes no memory until it is written to
    same = {"weights": sum(weight.numel() for weight in backbone.parameters()), "flops": forward_flops(backbone)}
    rows = []
    for arm, share in ((OURS, 0.0), (AGAIN, 1.0)):
        make = partial(build_backbone, name, embedding_size=dim, recompute=share)
        single, half = (bytes_per_image(make, dtype=dtype) for dtype in (None, torch.bfloat16))
        rows.append({"backbone": name, "arm": arm, **same, "fp32": single, "bf16": half})
    return rows


def cells(row: dict[str, Any], plain: float | None, batch: int) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them. plain: median seconds of a step of that arm."""
    single: Bytes | None = row.get("fp32")
    half: Bytes | None = row.get("bf16")
    published = PUBLISHED.get(row["backbone"])
    forward, step, measured = row.get("forward seconds"), row.get("step seconds"), row.get("bytes of a step")
    median = statistics.median(step) if step else None
    return (
        row["backbone"],
        row["arm"],
        f"{row['weights'] / 1e6:.2f}" if single else "-",
        f"{row['flops'] / 1e9:.2f}" if single else "-",
        f"{2 * published:g}" if published and single else "-",
        *(digits(value / 1e6) if single and half else "-" for value in _four(single, half)),
        digits(batch / statistics.median(forward)) if forward else "-",
        digits(batch / median) if median else "-",
        f"{plain / median:.2f}" if plain and median else "-",
        digits(measured / 1e6) if measured else "-",
    )


def _four(single: Bytes | None, half: Bytes | None) -> tuple[float, ...]:
    if single is None or half is None:
        return (0.0,) * 4
    return single.kept, half.kept, single.peak, half.peak


def _run(args: argparse.Namespace, arguments: Sequence[str], ranks: Ranks) -> None:
    about = facts(ranks.device, "benchmarks.backbones", arguments)
    texts: list[tuple[str, ...]] = []
    rows: list[dict[str, Any]] = []
    for name in args.only:
        counted = {row["arm"]: row for row in count(name, args.dim)}
        timed = {row["arm"]: row for row in measure(name, args, ranks)} if name in args.timed else {}
        plain = statistics.median(timed[PLAIN]["step seconds"]) if timed else None
        for arm in ARMS:
            row = {**counted.get(arm, {}), **timed.get(arm, {})}
            if row:
                texts.append(cells(row, plain, args.batch))
                rows.append({key: value._asdict() if isinstance(value, Bytes) else value for key, value in row.items()})
    about["GFLOPs"] = "of an image forward; a multiplication and an addition are two"
    about["published"] = (
        "twice the multiplications with additions of arcface_torch's README (deepinsight/insightface, commit 0159b24d)"
    )
    about["kept, peak"] = (
        "bytes / 10^6 that an image adds in training: what autograd saves, and the highest point of forward and "
        "backward, under autocast in bf16; counted from the shapes of the CPU's operators, without weights"
    )
    about["img/s"] = (
        f"B = {args.batch}, D = {args.dim}, {args.precision}, 1 rank; medians of {args.repeats} turns after "
        f"{args.warmup} of warm-up, the arms alternating; a step is forward, backward and SGD"
    )
    about["measured"] = (
        "on GPUs: bytes / 10^6 that a step allocates at its peak, beyond the weights, momentum and gradients that are "
        "there before it"
    )
    publish(_TITLE, HEADER, texts, about=about, rows=rows, out=args.out, only_in_file=_ONLY_IN_FILE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(names()), metavar="NAME", help="default: all of our own")
    parser.add_argument(
        "--timed",
        nargs="*",
        metavar="NAME",
        help=f"backbones whose images a second are measured; default {' '.join(_SMALL)} on a CPU, all on a GPU",
    )
    parser.add_argument("--batch", type=int, default=0, help="images, default 8 on a CPU, 128 on a GPU")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="one more arm, through torch.compile")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each arm, default 3")
    parser.add_argument("--warmup", type=int, default=1, help="turns before those, default 1")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="for arithmetic on the CPU, default all cores")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.repeats, args.dim) < 1 or args.warmup < 0 or args.batch < 0 or args.batch == 1:
        parser.error("expected --repeats and --dim of at least 1, --warmup 0 or more, --batch of at least 2")
    if missing := [name for name in args.timed or () if name not in args.only]:
        parser.error(f"--timed: {missing[0]} is not among those of --only")
    try:
        for name in args.only:
            _shapes(name, args.dim)
        with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
            cuda = ranks.device.type == "cuda"
            args.batch = args.batch or (128 if cuda else 8)
            args.precision = args.precision or ("bf16" if cuda else "fp32")
            torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # as `open_ranks` does for training
            if args.timed is None:
                args.timed = args.only if cuda else [name for name in args.only if name in _SMALL]
            _run(args, arguments, ranks)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
