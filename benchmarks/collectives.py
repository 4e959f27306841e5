"""What do the head's collectives cost a step, against those of insightface's Partial FC?

Both patterns run alone, without the arithmetic between them, on ranks of this machine (started here) or on those that
torchrun starts. Collectives and bytes are counted as torch dispatches them; a step of the real head is counted beside
them and must run the same. NCCL where every rank has a GPU, gloo on the loopback device elsewhere.

Theirs is the pattern of version 2, written from its description: all-gathers of labels and of embeddings; all-reduces
of each row's maximum, its sum and its target's probability; in backward a reduce to each rank of its rows' gradient.

Legend: B rows of one rank, W ranks, N = W x B rows of all ranks, D embedding size.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.measuring.report import digits, facts, publish, spread
from benchmarks.measuring.tally import Tally
from configs.schema import ConfigError, HeadConfig, TrainConfig
from partial_fc.collectives import all_reduce_, gather_batch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks, open_ranks
from training.showing.timing import Stopwatch

_TITLE = "Collectives of the head: one step"
_HEADER = ("ranks", "pattern", "calls", "sent kB", "step ms", "range ms", "speed")
_CLASSES = 64  # a rank, of the real head whose collectives are counted

THEIRS, OURS, OURS_BF16 = "partial_fc_style", "ours", "ours, bf16 wire"


class Batch:
    """A rank's rows, and a gradient for the rows of all."""

    def __init__(self, batch: int, dim: int, ranks: Ranks) -> None:
        generator = torch.Generator().manual_seed(ranks.rank)
        W = ranks.world_size
        self.x_BD = F.normalize(torch.randn(batch, dim, generator=generator)).to(ranks.device).requires_grad_()
        self.labels_B = torch.randint(0, W * _CLASSES, (batch,), generator=generator).to(ranks.device)
        self.grad_ND = torch.randn(W * batch, dim, generator=generator).to(ranks.device)
        self.ranks = ranks


def ours(batch: Batch, wire_dtype: torch.dtype = torch.float32) -> None:
    """One all-gather, one all-reduce of 2N float64; backward one reduce-scatter, or in bf16 one all-to-all."""
    gathered = gather_batch(batch.x_BD, batch.labels_B, batch.labels_B, batch.ranks.group, wire_dtype=wire_dtype)
    all_reduce_(gathered.x_ND.new_zeros(2, len(gathered.x_ND), dtype=torch.float64), batch.ranks.group)
    gathered.x_ND.backward(batch.grad_ND)


class _GatherThenReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BD) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x_BD.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        parts = list(grad_ND.clone().chunk(dist.get_world_size(ctx.group)))
        waiting = [dist.reduce(part, group_dst=rank, group=ctx.group, async_op=True) for rank, part in enumerate(parts)]
        for work in waiting:
            work.wait()
        return parts[dist.get_rank(ctx.group)], None


def theirs(batch: Batch) -> None:
    """Two all-gathers, three all-reduces of N floats; backward W reduces."""
    group = batch.ranks.group
    labels = [torch.empty_like(batch.labels_B) for _ in range(batch.ranks.world_size)]
    dist.all_gather(labels, batch.labels_B, group=group)
    x_ND: Tensor = _GatherThenReduce.apply(batch.x_BD, group)  # type: ignore[no-untyped-call]
    for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM, dist.ReduceOp.SUM):
        dist.all_reduce(x_ND.new_zeros(len(x_ND), 1), op=op, group=group)
    x_ND.backward(batch.grad_ND)


PATTERNS: dict[str, Callable[[Batch], None]] = {
    THEIRS: theirs,
    OURS: ours,
    OURS_BF16: functools.partial(ours, wire_dtype=torch.bfloat16),
}


def count(step: Callable[[Batch], None], batch: Batch) -> Tally:
    """Collectives and bytes of one step, which runs."""
    with Tally(batch.ranks.world_size) as tally:
        step(batch)
    batch.x_BD.grad = None
    return tally


def check_head(batch: Batch, wire_dtype: Literal["fp32", "bf16"]) -> Tally:
    """The same of the real head, over few classes. It must run what `ours` runs: raises RuntimeError if not."""
    W, dim = batch.ranks.world_size, batch.x_BD.shape[1]
    head = PartialFCHead(
        num_classes=W * _CLASSES,
        embedding_size=dim,
        config=HeadConfig(wire_dtype=wire_dtype),
        group=batch.ranks.group,
        seed=0,
    ).to(batch.ranks.device)

    def step(batch: Batch) -> None:
        head(head.gather(batch.x_BD, batch.labels_B, batch.labels_B), step=0).backward()

    real, alone = count(step, batch), count(PATTERNS[OURS if wire_dtype == "fp32" else OURS_BF16], batch)
    if (real.calls, real.sent) != (alone.calls, alone.sent):
        raise RuntimeError(
            f"the head runs {real}, {real.sent:.0f} bytes; this benchmark {alone}, {alone.sent:.0f} bytes: mend it"
        )
    return real


def time_patterns(batch: Batch, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn by pattern: of the rank that took longest, from a common start."""
    times: dict[str, list[float]] = {name: [] for name in PATTERNS}
    for turn in range(-warmup, repeats):
        names = list(PATTERNS)
        first = turn % len(names)  # none always comes first
        for name in (*names[first:], *names[:first]):
            watch = Stopwatch(batch.ranks.device)
            batch.ranks.barrier()
            with watch:
                PATTERNS[name](batch)
            batch.x_BD.grad = None
            longest = torch.tensor(watch.take(), device=batch.ranks.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=batch.ranks.group)
            if turn >= 0:
                times[name].append(longest.item())
    return times


def compare(args: argparse.Namespace, arguments: Sequence[str], ranks: Ranks) -> None:
    """On every rank; the first one prints and writes."""
    batch = Batch(args.batch, args.dim, ranks)
    check_head(batch, "fp32")
    check_head(batch, "bf16")
    tallies = {name: count(step, batch) for name, step in PATTERNS.items()}
    times = time_patterns(batch, args.warmup, args.repeats)
    if not ranks.is_main:
        return
    base = statistics.median(times[THEIRS])
    texts, rows = [], []
    for name, tally in tallies.items():
        median = statistics.median(times[name])
        milliseconds = [1000 * seconds for seconds in times[name]]
        texts.append(
            (
                str(ranks.world_size),
                name,
                str(sum(tally.calls.values())),
                digits(tally.sent / 1e3),
                digits(1000 * median),
                spread(milliseconds),
                f"{base / median:.2f}",
            )
        )
        rows.append({"pattern": name, "calls": dict(tally.calls), "sent_bytes": tally.sent, "step": times[name]})
    about = facts(ranks.device, "benchmarks.collectives", arguments)
    about["work"] = (
        f"B = {args.batch} a rank, D = {args.dim}, {ranks.world_size} ranks, {dist.get_backend(ranks.group)}; time of "
        f"the slowest rank, median of {args.repeats} turns after {args.warmup} of warm-up, the patterns alternating"
    )
    about |= {name: str(tally) for name, tally in tallies.items()}
    about["sent kB"] = "of one rank, on average, by the algorithm that sends the least"
    about["speed"] = f"steps in the time of one step of {THEIRS}"
    publish(_TITLE, _HEADER, texts, about=about, rows=rows, out=args.out, only_in_file=("range ms",))


def _work(local_rank: int, args: argparse.Namespace, arguments: Sequence[str], port: int) -> None:
    here = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": args.ranks, "LOCAL_WORLD_SIZE": args.ranks}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    _join(args, arguments)


def _join(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    with open_ranks(TrainConfig(device=args.device, cpu_threads=args.threads)) as ranks:
        compare(args, arguments, ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="to start here, default 2; without effect under torchrun")
    parser.add_argument("--batch", type=int, default=128, help="rows of a rank, default 128")
    parser.add_argument("--dim", type=int, default=512, help="embedding size, default 512")
    parser.add_argument("--repeats", type=int, default=50, help="timed turns of each pattern, default 50")
    parser.add_argument("--warmup", type=int, default=5, help="turns before those, default 5")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of a rank, for arithmetic on the CPU, default 1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    args = parser.parse_args(arguments)
    if min(args.batch, args.dim, args.repeats) < 1 or args.ranks < 2 or args.warmup < 0:
        parser.error("expected --ranks of at least 2, --batch, --dim, --repeats of at least 1, --warmup 0 or more")
    try:
        if "WORLD_SIZE" in os.environ:
            _join(args, arguments)
            return 0
        if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
            parser.error(f"--device cuda: {args.ranks} ranks need as many GPUs, {torch.cuda.device_count()} are here")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(_work, args=(args, arguments, port), nprocs=args.ranks)
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
