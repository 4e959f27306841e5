"""How fast are whole iterations of spherical k-means, against faiss and a plain loop in torch, and as good?

All ways of `benchmarks.clusters.kmeans_arms` make the same number of iterations on the same points from the same
centres (points drawn at random), in one process, in turns. `--points` and `--clusters` may be several: every pair of
them is run, and the plot shows how time grows. Quote the ratios.

Legend: N points, K clusters, D embedding size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.clusters.kmeans_arms import DATA, EVERYTHING, FAISS, FLASH, OURS, Outcome, arms, objective
from benchmarks.clusters.kmeans_plot import save_scaling_plot
from benchmarks.measuring.report import digits, facts, publish, spread
from benchmarks.measuring.roofline import gemm_peak
from configs.schema import ConfigError, TrainConfig
from training.distributed import Ranks, open_ranks

HEADER = (
    "data, N x K", "way", "seconds", "range s", "CPU s", "speed", "CPU speed", "GEMM share", "objective", "loss",
    "compared",
)  # fmt: skip
ONLY_IN_FILE = ("range s", "CPU s", "GEMM share", "objective")
_LEGEND = {
    "speed": f"time of {FAISS} over the time of this; CPU speed: the same of CPU seconds, which other processes on the "
    "same cores disturb less",
    "GEMM share": "time that one product of all points with all centres an iteration would take at the peak rate, over "
    "the time; above 1 where comparisons are left out",
    "objective": "mean cosine of the points to the nearest of the centres at the end, in float64",
    "loss": f"how far it is below that of {FAISS}, relative; negative: it is better",
    "compared": "work of the comparisons over that of all with all, mean of the iterations",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Figures of one way at one size; an entry of wall and cpu for each turn."""

    data: str
    points: int
    clusters: int
    way: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    gemm: float
    """Seconds of the products alone, at the peak rate."""
    objective: float
    compared: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def problem(self) -> str:
        return f"{self.data}, {self.points:,} x {self.clusters:,}"


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them."""
    baseline = next((other for other in rows if other.problem == row.problem and other.way == FAISS), None)
    return (
        row.problem,
        row.way,
        digits(row.median),
        spread(row.wall),
        digits(statistics.median(row.cpu)),
        f"{baseline.median / row.median:.2f}" if baseline else "-",
        f"{statistics.median(baseline.cpu) / statistics.median(row.cpu):.2f}" if baseline else "-",
        f"{row.gemm / row.median:.2f}",
        f"{row.objective:.6f}",
        f"{1 - row.objective / baseline.objective:.1e}" if baseline else "-",
        "-" if row.compared is None else f"{row.compared:.3f}",
    )


def main_ways(device: torch.device) -> tuple[str, ...]:
    """Those of --main-only. On GPUs bounds spare little time: what all comparisons take is shown as well."""
    return (OURS, FAISS, *((EVERYTHING, FLASH) if device.type == "cuda" else ()))


def measure(data: str, points: int, clusters: int, peak: float, args: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """A row for each way. peak: flops a second."""
    generator = torch.Generator().manual_seed(args.seed)
    x_ND = DATA[data](points, clusters, args.dim, generator)
    start_KD = x_ND[torch.randperm(points, generator=generator)[:clusters]]
    x_ND, start_KD = x_ND.to(ranks.device), start_KD.to(ranks.device)
    ways, _ = arms(ranks.group, ranks.device)
    ways = {name: run for name, run in ways.items() if name in main_ways(ranks.device) or not args.main_only}
    for name, run in ways.items():  # threads, buffers and kernels are made: some for each size
        whole = name == FLASH
        run(x_ND if whole else x_ND[:2048], start_KD if whole else start_KD[:64], 1)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(args.repeats):
        first = turn % len(names)  # nobody always comes first
        for name in (*names[first:], *names[:first]):
            outcomes[name].append(ways[name](x_ND, start_KD, args.iterations))
    return [
        Row(
            data=data,
            points=points,
            clusters=clusters,
            way=name,
            wall=tuple(outcome.wall for outcome in found),
            cpu=tuple(outcome.cpu for outcome in found),
            gemm=2.0 * points * clusters * args.dim * args.iterations / peak,
            objective=objective(x_ND, found[0].centres_KD),
            compared=found[0].compared,
        )
        for name, found in outcomes.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kmeans", description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[200_000], metavar="N")
    parser.add_argument("--clusters", type=int, nargs="+", default=[2_000], metavar="K")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA), help="default both")
    parser.add_argument("--repeats", type=int, default=1, help="turns, default 1")
    parser.add_argument("--main-only", action="store_true", help=f"run {OURS} and rivals alone")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cuda: ours in bf16")
    parser.add_argument("--threads", type=int, default=0, help="for arithmetic on the CPU, default all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time over N there, a line for each K, PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.iterations, args.repeats, args.dim, *args.clusters, *args.points) < 1:
        parser.error("expected sizes, --iterations and --repeats of at least 1")
    if max(args.clusters) > min(args.points):
        parser.error(f"expected no more clusters than points, got {max(args.clusters)} and {min(args.points)}")
    try:
        with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
            _compare(args, ranks, facts(ranks.device, "benchmarks.kmeans", arguments))
    except ConfigError as error:
        parser.error(str(error))
    return 0


def _compare(args: argparse.Namespace, ranks: Ranks, about: dict[str, str]) -> None:
    peak, products = gemm_peak(ranks.device, 1024, args.dim)
    sizes = itertools.product(args.data, args.points, args.clusters)
    rows = [row for size in sizes for row in measure(*size, peak, args, ranks)]
    about |= {name: f"left out: {reason}" for name, reason in arms(ranks.group, ranks.device)[1].items()}
    about["work"] = f"D = {args.dim}, {args.iterations} iterations, median of {args.repeats} turns, seed {args.seed}"
    about["GEMM peak"] = f"{peak / 1e12:.3g} Tflop/s, measured before: {products}"
    about |= _versions() | _LEGEND
    data: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
    texts = [cells(row, rows) for row in rows]
    title = "Spherical k-means: whole iterations"
    publish(title, HEADER, texts, about=about, rows=data, out=args.out, only_in_file=ONLY_IN_FILE)
    if args.plot is not None:
        save_scaling_plot(rows, args.plot, title=f"{args.iterations} iterations, D = {args.dim}")


def _versions() -> dict[str, str]:
    try:
        import faiss  # noqa: PLC0415
    except ImportError:
        return {}
    return {"faiss": f"{faiss.__version__}, {faiss.get_compile_options().strip()}"}


if __name__ == "__main__":
    sys.exit(main())
