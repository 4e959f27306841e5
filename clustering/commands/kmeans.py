"""`python -m clustering kmeans`: centres and assignments of embeddings that lie in files."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clustering.commands.arguments import nonnegative, whole
from clustering.commands.progress import Display
from clustering.job.files import FileRows, unit_rows
from clustering.job.job import Job, Outcome, Settings
from clustering.job.sharded_files import read_sharded, write_sharded
from clustering.job.state import JobState
from clustering.job.together import InputError, on_rank_zero, together
from clustering.job.writing import write_bytes
from clustering.lloyd.seeding import class_means, placed, plus_plus, random_rows, too_few
from clustering.lloyd.seeding_parallel import parallel_plus_plus
from clustering.service.parts import PartFiles, contains, map_array
from configs.schema import ConfigError, TrainConfig
from partial_fc.collectives import all_reduce_
from training.distributed import Ranks, open_ranks

_SEEDINGS = {"random": random_rows, "kmeans++": plus_plus, "kmeans-parallel": parallel_plus_plus}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EPILOG = """
Written are OUT (K, D), float32 unit rows; OUT's name with .assignments.npy, int32 (N,): the cluster of each row, -1 for
a row of zeros; and with .json: settings, versions and iterations. An interrupted job goes on when it is started again
with the same arguments, on any number of ranks; it keeps its state in OUT.part.

    python -m clustering kmeans embeddings.npy --k 1000 --out centres.npy
    torchrun --nproc_per_node=8 -m clustering kmeans parts/ --k 100000 --out centres.npy
"""


class Interrupted(BaseException):
    """A signal asked the job to end."""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "kmeans",
        help="spherical k-means of .npy files, on one process or many",
        description="Spherical k-means: rows are scaled to unit length and clustered by their cosines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="EMBEDDINGS", help="a .npy file (N, D), or a folder of them")
    about = "clusters; default: those of --start or --labels"
    parser.add_argument("--k", type=whole(1, 2**31 - 1), metavar="K", help=about)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the centres, a .npy")
    parser.add_argument("--seeding", choices=sorted(_SEEDINGS), help="where centres start, default random samples")
    parser.add_argument("--start", type=Path, metavar="FILE", help="start from these centres, a .npy (K, D)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="start from the means of classes, a .npy (N,)")
    parser.add_argument("--iterations", type=whole(1), default=20, help="at most, default 20")
    parser.add_argument(
        "--tolerance",
        type=nonnegative,
        default=1e-4,
        metavar="SHARE",
        help="stop when the mean cosine gains less than this share of it, default 0.0001; 0: when it gains nothing",
    )
    parser.add_argument("--batch", type=whole(1), default=0, metavar="ROWS", help="mini-batches of so many rows")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default 0")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32", help="of products, default fp32")
    parser.add_argument("--in-memory", action="store_true", help="keep the rows in memory even where they fill it")
    parser.add_argument("--force", action="store_true", help="replace what is there, and start over")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when done, 2 when arguments or files are not as expected, 130 or 143 when interrupted; one line says what."""
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        raise Interrupted

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    opened: list[Ranks] = []
    try:
        _check(args)
        with open_ranks(TrainConfig(device=args.device, precision="fp32")) as ranks:
            opened.append(ranks)
            _cluster(args, ranks)
    except (InputError, ConfigError) as error:
        return _say(str(error), opened, 2)
    except BaseException:  # a rank that waits for one that has ended meets another error than its own signal
        if not received:
            raise
        about = f"interrupted: start it again with the same arguments to go on from {_state(args)}"
        return _say(about, opened, 128 + received[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _say(error: str, opened: list[Ranks], code: int) -> int:
    first = opened[0].first_to_say(error) if opened else os.environ.get("LOCAL_RANK", "0") == "0"
    if first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _check(args: argparse.Namespace) -> None:
    """What needs no other rank. Raises InputError."""
    if sum(value is not None for value in (args.seeding, args.start, args.labels)) > 1:
        raise InputError("expected one of --seeding, --start and --labels at most, got several")
    if args.k is None and args.start is None and args.labels is None:
        raise InputError("expected --k, the number of clusters")
    if args.out.suffix != ".npy":
        raise InputError(f"--out {args.out}: expected a name that ends in .npy")
    if contains(args.source, args.out):
        raise InputError(f"--out {args.out}: expected a place outside of {args.source}: it would be read as embeddings")


def _state(args: argparse.Namespace) -> Path:
    path: Path = args.out.with_name(args.out.name + ".part")
    return path


def _cluster(args: argparse.Namespace, ranks: Ranks) -> None:
    group, device = ranks.group, ranks.device
    begin = time.perf_counter()

    def check_out() -> None:
        if args.out.exists() and not args.force:
            raise InputError(f"{args.out}: expected no file there: name another, or replace it with --force")

    on_rank_zero(check_out, group, device)
    files = together(lambda: PartFiles(args.source), group, device)
    clusters, start = _start(args, files, ranks)
    rows = FileRows(files, group=group, device=device, in_memory=args.in_memory)
    with Display(ranks.is_main, args.iterations) as display:
        with display.reading(len(rows)) as progress:
            survey = rows.survey(progress)
        usable = rows.total - survey.zero_rows
        if clusters > usable:
            raise too_few(clusters, usable)
        settings = Settings(
            num_clusters=clusters,
            iterations=args.iterations,
            tolerance=args.tolerance,
            batch=min(args.batch, rows.total),
            seed=args.seed,
            product_dtype=_DTYPES[args.dtype],
        )
        fingerprint = together(lambda: _fingerprint(args, settings, rows, survey.checksum), group, device)
        state = JobState(_state(args), fingerprint, group, device)
        if args.force:
            state.remove()
        display.about(rows.total, rows.dim, clusters, survey.zero_rows)
        outcome = Job(rows, settings, state, group, device, told=display.step).run(lambda: start(rows))
    _write(args, outcome, rows, ranks, {**fingerprint, "zero rows": survey.zero_rows}, time.perf_counter() - begin)
    state.remove()
    if ranks.is_main:
        empty = f", {outcome.empty} of them empty" if outcome.empty else ""
        print(f"{args.out}: {clusters} centres of {rows.dim} components{empty}; mean cosine {outcome.mean_cosine:.5f}")


def _start(args: argparse.Namespace, files: PartFiles, ranks: Ranks) -> tuple[int, Callable[[FileRows], Tensor]]:
    """The number of clusters, and where they start. Raises InputError on all ranks."""
    group, device = ranks.group, ranks.device
    if args.start is not None:
        what = f"float32 centres (K, {files.dim})"
        found = together(lambda: map_array(args.start, kinds="f", shape=(args.k, files.dim), what=what), group, device)
        clusters = len(found)
        if not clusters:
            raise InputError(f"{args.start}: expected {what}, got 0 of them")
        return clusters, lambda rows: _unit_centres(args.start, clusters, rows, ranks)
    if args.labels is not None:
        classes = together(lambda: _read_labels(args.labels, files.rows), group, device)
        clusters = int(classes.max()) + 1 if args.k is None else args.k
        if clusters <= int(classes.max()):
            raise InputError(
                f"--k {clusters}: expected at least as many clusters as {args.labels} has classes, got "
                f"{int(classes.max()) + 1} classes"
            )
        return clusters, lambda rows: class_means(
            rows,
            torch.from_numpy(classes[rows.shard.start : rows.shard.stop].astype(np.int64)).to(device),
            clusters,
            total=rows.total,
            group=group,
        )
    seed = _SEEDINGS[args.seeding or "random"]
    return args.k, lambda rows: seed(placed(rows, rows.shard.start, device), args.k, group, seed=args.seed)


def _read_labels(path: Path, rows: int) -> npt.NDArray[Any]:
    classes_N = map_array(path, kinds="iu", shape=(rows,), what=f"a whole number for each of the {rows} rows")
    if int(classes_N.min()) < -1 or int(classes_N.max()) < 0:
        raise InputError(
            f"{path}: expected classes from 0 on, or -1 for none, got {classes_N.min()} … {classes_N.max()}"
        )
    return classes_N


def _unit_centres(path: Path, clusters: int, rows: FileRows, ranks: Ranks) -> Tensor:
    """This rank's shard of given centres, scaled to unit length; a zero row starts as an empty cluster does."""
    centres_SD = read_sharded(path, clusters, rows.dim, ranks.group, ranks.device)
    bad = int(all_reduce_((~centres_SD.isfinite()).any(1).sum(), ranks.group))
    if bad:
        raise InputError(f"{path}: {bad} of {clusters} centres hold numbers that are not finite: start from others")
    return unit_rows(centres_SD)


def _fingerprint(args: argparse.Namespace, settings: Settings, rows: FileRows, checksum: int) -> dict[str, Any]:
    """Data and settings; a job that goes on has the same."""
    given = args.start or args.labels
    return {
        "rows": rows.total,
        "components": rows.dim,
        "checksum of the rows": checksum,
        "k": settings.num_clusters,
        "seeding": "start" if args.start else "labels" if args.labels else args.seeding or "random",
        "checksum of --start or --labels": None if given is None else _file_checksum(given),
        "iterations": settings.iterations,
        "tolerance": settings.tolerance,
        "batch": settings.batch,
        "seed": settings.seed,
        "dtype": args.dtype,
    }


def _file_checksum(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None


def _write(
    args: argparse.Namespace, outcome: Outcome, rows: FileRows, ranks: Ranks, about: dict[str, Any], seconds: float
) -> None:
    """The centres last: where they are, all is there. Raises InputError on all ranks."""
    told = {
        "settings": about,
        "mean cosine": outcome.mean_cosine,
        "empty clusters": outcome.empty,
        "iterations": [dataclasses.asdict(step) for step in outcome.steps],
        "seconds": round(seconds, 3),
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    content = (json.dumps(told, indent=1) + "\n").encode()
    on_rank_zero(lambda: write_bytes(args.out.with_suffix(".json"), content), ranks.group, ranks.device)
    assignments = args.out.with_suffix(".assignments.npy")
    write_sharded(assignments, outcome.index_P, rows.total, ranks.group, dtype=np.int32)
    write_sharded(args.out, outcome.centres_SD, about["k"], ranks.group)
