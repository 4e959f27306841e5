"""How fast is the head, and how much memory does it need, against insightface's Partial FC and other heads?

All heads of `benchmarks.heads.arms` do the same work on the same centres, in one process, in turns: over all classes,
and over sampled shares of them. Medians over several turns after a warm-up. Quote the ratios: times of different
machines, or of different runs, do not compare. What counts is the whole step: ours computes the centres' gradient in
the optimizer.

Legend: B rows of the batch, D embedding size, C classes, S of them that take part.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.heads.arm_memory import extra_in_own_process
from benchmarks.heads.arms import OURS, Arm, Problem, arms_of
from benchmarks.heads.plot import save_step_plot
from benchmarks.heads.rows import HEADER, ONLY_IN_FILE, Row, ceilings, cells
from benchmarks.measuring.options import check_sizes
from benchmarks.measuring.report import facts, publish
from benchmarks.measuring.roofline import gemm_peak, head_flops
from configs.schema import ConfigError, HeadConfig, TrainConfig
from training.distributed import Ranks, open_ranks

_TITLE = "Head of the margin softmax: one step"


def why_not(arm: Arm, classes: int, args: argparse.Namespace, device: torch.device) -> str:
    """Empty when the head fits. Ours is never left out."""
    limit = args.memory_limit * 1e9
    if not limit:
        limit = 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    need = arm.bytes_needed(classes, args.batch, args.dim)
    if arm.kind == OURS or need <= limit:
        return ""
    return f"it needs {need / 1e9:.2g} GB, the limit is {limit / 1e9:.2g} GB"


def measure(classes: int, arms: Sequence[Arm], peak: float, args: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """A row for each head. Memory first, in processes of their own; then times, in turns. peak: flops a second.

    A head other than ours that does not live through the first is left out.
    """
    gc.collect()  # what an earlier number of classes left behind
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    config = HeadConfig(impl=args.impl, centre_dtype=args.centre_dtype)
    skipped = {arm: why_not(arm, classes, args, ranks.device) for arm in arms}
    extra: dict[Arm, int | None] = {}
    for arm in (arm for arm in arms if not skipped[arm]):
        try:
            extra[arm] = extra_in_own_process(
                arm,
                classes,
                batch=args.batch,
                dim=args.dim,
                device=args.device,
                threads=args.threads,
                seed=args.seed,
                config=config,
            )
        except RuntimeError as error:
            if arm.kind == OURS:
                raise
            skipped[arm] = str(error)
    running = list(extra)
    problem = Problem(classes, batch=args.batch, dim=args.dim, seed=args.seed, config=config, ranks=ranks)
    problem.check(running)
    times: dict[Arm, list[tuple[float, float]]] = {arm: [] for arm in running}
    for turn in range(-args.warmup, args.repeats):
        first = turn % len(running)  # nobody always comes first
        for arm in (*running[first:], *running[:first]):
            seconds = problem.step(arm, args.warmup + turn)
            if turn >= 0:
                times[arm].append(seconds)
    rows = []
    for arm in arms:
        centres = arm.centres(classes, problem.positives)
        if skipped[arm]:
            rows.append(Row(classes, arm, centres, skipped=skipped[arm]))
            continue
        learn, step = tuple(pair[0] for pair in times[arm]), tuple(sum(pair) for pair in times[arm])
        rows.append(
            Row(classes, arm, centres, learn, step, extra[arm], head_flops(args.batch, args.dim, centres) / peak)
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 93_431, 360_232], metavar="C")
    parser.add_argument("--batch", type=int, default=128, help="rows of the batch, default 128")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1], metavar="R", help="default 1 0.1")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each head, default 3")
    parser.add_argument("--warmup", type=int, default=1, help="turns before those, default 1")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cuda: products in bf16")
    parser.add_argument("--threads", type=int, default=0, help="for arithmetic on the CPU, default all cores")
    parser.add_argument("--impl", choices=["auto", "torch", "triton"], default="auto", help="of ours")
    parser.add_argument("--centre-dtype", choices=["fp32", "bf16"], default="fp32", help="of ours, and of its momentum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory-limit", type=float, default=0.0, metavar="GB",
        help="leave other heads out above this; default 8 on CPUs, 90%% of what is free on a GPU",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw step time over sampled classes there, PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    check_sizes(parser, args)
    try:
        with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
            _compare(args, ranks, facts(ranks.device, "benchmarks.head", arguments))
    except ConfigError as error:
        parser.error(str(error))
    return 0


def _compare(args: argparse.Namespace, ranks: Ranks, about: dict[str, str]) -> None:
    arms, left_out = arms_of(args.rates, ranks.device)
    peak, products = gemm_peak(ranks.device, args.batch, args.dim)
    rows = [row for classes in args.classes for row in measure(classes, arms, peak, args, ranks)]
    about |= {name: f"left out: {reason}" for name, reason in left_out.items()}
    for row in rows:
        if row.skipped:
            about[f"{row.arm} at {row.classes:,} classes"] = f"left out: {row.skipped}"
    precision = "bf16 products, fp32 sums" if ranks.device.type == "cuda" else "fp32"
    about["work"] = (
        f"B = {args.batch}, D = {args.dim}, ArcFace, {precision}, SGD with momentum, 1 rank; ours with "
        f"impl={args.impl} and {args.centre_dtype} centres; median of "
        f"{args.repeats} turns after {args.warmup} of warm-up, the heads alternating"
    )
    about["GEMM peak"] = f"{peak / 1e12:.3g} Tflop/s, measured before the heads: {products}"
    about |= ceilings(rows)
    publish(
        _TITLE,
        HEADER,
        [cells(row, rows) for row in rows],
        about=about,
        rows=[row.as_data() for row in rows],
        out=args.out,
        only_in_file=ONLY_IN_FILE,
    )
    if args.plot is not None:
        save_step_plot(rows, args.plot, title=f"One step, B = {args.batch}, D = {args.dim}")


if __name__ == "__main__":
    sys.exit(main())
