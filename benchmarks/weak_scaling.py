"""Weak scaling of the head: as many class centres on every rank, and 1, 2, 4 … ranks.

A step is the packed gather, the margin softmax, its backward and the centres' optimizer. Two ways to add ranks:

    same N    the global batch stays: a rank's arithmetic, N x C / W products, stays, and its step should take as long
    same B    each rank brings as many rows: N, and with it a rank's arithmetic, grows with W

Ranks are started here, gloo on the loopback device, one thread each. Where there are fewer cores than ranks they share
them, and the time of a step says nothing of scaling; the CPU time of a rank's main thread, which does the arithmetic,
does, as it waits for the others without running.

Legend: B rows of one rank, W ranks, N = W x B rows of all ranks, C classes of all ranks, D embedding size.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.measuring.report import digits, facts, publish, spread
from benchmarks.measuring.tally import Tally
from configs.schema import HeadConfig, TrainConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from training.distributed import Ranks, open_ranks

_TITLE = "Weak scaling of the head: one step"
_HEADER = ("ranks", "batch", "N", "C", "CPU ms", "of 1 rank", "a product", "step ms", "range ms", "sent kB")
SAME_N, SAME_B = "same N", "same B"


def _measure(ranks: Ranks, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """rows: B. Times of every turn: a step's of the slowest rank, and CPU seconds, mean over ranks. On every rank."""
    W = ranks.world_size
    head = PartialFCHead(
        num_classes=W * args.classes, embedding_size=args.dim, config=HeadConfig(), group=ranks.group, seed=0
    )
    optimizer = CentreSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(ranks.rank)
    x_BD = torch.randn(rows, args.dim, generator=generator)
    labels_B = torch.randint(0, W * args.classes, (rows,), generator=generator)
    steps: list[float] = []
    cpu: list[float] = []

    def step(number: int) -> None:
        leaf_BD = x_BD.clone().requires_grad_()
        head(head.gather(leaf_BD, labels_B, labels_B), step=number).backward()
        optimizer.step()

    with Tally(W) as tally:
        step(0)
    for turn in range(args.warmup + args.repeats):
        ranks.barrier()
        began, worked = time.perf_counter(), time.thread_time()
        step(turn + 1)
        spent = torch.tensor([time.perf_counter() - began, time.thread_time() - worked], dtype=torch.float64)
        spent_W2 = torch.zeros(W, 2, dtype=torch.float64)
        spent_W2[ranks.rank] = spent
        dist.all_reduce(spent_W2, group=ranks.group)
        if turn >= args.warmup:
            steps.append(spent_W2[:, 0].max().item())
            cpu.append(spent_W2[:, 1].mean().item())
    return {"ranks": W, "rows": rows, "step": steps, "cpu": cpu, "sent_bytes": tally.sent}


def _work(local_rank: int, world_size: int, args: argparse.Namespace, port: int, out: str) -> None:
    here = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with open_ranks(TrainConfig(device="cpu", cpu_threads=1)) as ranks:
        found = [
            {"batch": SAME_N, **_measure(ranks, args.batch // world_size, args)},
            {"batch": SAME_B, **_measure(ranks, args.batch // max(args.ranks), args)},
        ]
        if ranks.is_main:
            Path(out).write_text(json.dumps(found), encoding="utf-8")


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world_size in args.ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            out = Path(folder) / f"{world_size}.json"
            spawn(_work, args=(world_size, args, port, str(out)), nprocs=world_size)
            rows += json.loads(out.read_text(encoding="utf-8"))
    return sorted(rows, key=lambda row: (row["batch"] != SAME_N, row["ranks"]))


def _text(row: dict[str, Any], first: dict[str, Any], classes: int) -> tuple[str, ...]:
    """first: the row of the fewest ranks, of the same kind of batch."""
    cpu, base = (statistics.median(one["cpu"]) for one in (row, first))
    N = row["rows"] * row["ranks"]
    more = N / (first["rows"] * first["ranks"])  # products of a rank, in those of a rank of `first`
    return (
        str(row["ranks"]),
        row["batch"],
        str(N),
        str(row["ranks"] * classes),
        digits(1000 * cpu),
        f"{cpu / base:.2f}",
        f"{cpu / base / more:.2f}",
        digits(1000 * statistics.median(row["step"])),
        spread([1000 * seconds for seconds in row["step"]]),
        digits(row["sent_bytes"] / 1e3),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weak_scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4; the fewest first")
    parser.add_argument("--classes", type=int, default=5_000, help="of a rank, default 5000")
    parser.add_argument("--batch", type=int, default=256, help="N of `same N`, and of the most ranks, default 256")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--repeats", type=int, default=10, help="timed turns, default 10")
    parser.add_argument("--warmup", type=int, default=3, help="turns before those, default 3")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    args = parser.parse_args(arguments)
    if min(*args.ranks, args.classes, args.dim, args.repeats) < 1 or args.warmup < 0:
        parser.error("expected --ranks, --classes, --dim and --repeats of at least 1, --warmup 0 or more")
    if args.ranks != sorted(args.ranks) or args.batch < 1 or any(args.batch % ranks for ranks in args.ranks):
        parser.error("expected --ranks from the fewest on, and a --batch that each of them can share out")
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), "benchmarks.weak_scaling", arguments)
    rows = _rows(args)
    about["work"] = (
        f"{args.classes} classes a rank, D = {args.dim}, float32, gloo on the loopback device, one thread a rank; "
        f"median of {args.repeats} turns after {args.warmup} of warm-up"
    )
    about["CPU ms"] = "of a rank's main thread, mean over ranks"
    about["of 1 rank"] = "CPU ms in those of the fewest ranks, for the same kind of batch"
    about["a product"] = "the same, divided by how many more products a rank has: 1 is perfect scaling"
    about["step ms"] = "of the slowest rank; with more ranks than cores they share them"
    about["sent kB"] = "of a rank, by rings"
    first = {kind: next(row for row in rows if row["batch"] == kind) for kind in (SAME_N, SAME_B)}
    texts = [_text(row, first[row["batch"]], args.classes) for row in rows]
    publish(_TITLE, _HEADER, texts, about=about, rows=rows, out=args.out, only_in_file=("range ms",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
