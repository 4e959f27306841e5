"""How long does a checkpoint keep training waiting, and how long does it take to go on from one?

The state is that of a large head: class centres with their momentum, on one rank. Ours copies it, and writes the copy
beside training; peers' way is torch.save of each rank's part while training waits, and torch.distributed.checkpoint's
own format, waited for as well. All write the same tensors to the same disk, brought to it (fsync), in turns; all read
them back into place. Ours alone compares what it reads with hashes.

Legend: C classes, D embedding size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.measuring.report import digits, facts, publish
from configs.schema import HeadConfig, TrainConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from training.checkpoint import Checkpoints, Saved, Saver, place_of
from training.checkpoint.manifest import Facts
from training.distributed import Ranks, open_ranks
from training.run_state import RunState

_HEADER = ("state", "way", "training waits s", "on the disk after s", "read into place s")


class Times(NamedTuple):
    """Seconds."""

    blocked: float
    written: float
    read: float


class _Run:
    """A head, its optimizer, and a backbone that is next to nothing."""

    def __init__(self, classes: int, dim: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.head = PartialFCHead(
            num_classes=classes, embedding_size=dim, config=HeadConfig(), group=ranks.group, seed=1
        )
        self.optimizer = CentreSGD(self.head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        weight = self.head.weight
        self.optimizer.state[weight] = {"steps": 1, "momentum_buffer": torch.full_like(weight, 0.5)}
        self.backbone = torch.nn.Linear(2, 2)
        self.state = RunState(
            backbone=self.backbone,
            head=self.head,
            optimizers=(torch.optim.SGD(self.backbone.parameters(), lr=0.1), self.optimizer),
            service=None,
            ranks=ranks,
            seed=1,
        )

    @property
    def momentum(self) -> torch.Tensor:
        found: torch.Tensor = self.optimizer.state[self.head.weight]["momentum_buffer"]
        return found

    def wipe(self) -> None:
        with torch.no_grad():
            self.head.weight.zero_()
            self.momentum.zero_()

    def is_back(self) -> bool:
        return self.momentum[-1].mean().item() == 0.5 and bool(self.head.weight[-1].any())


class Ours:
    """`training.checkpoint`."""

    name = "ours"

    def __init__(self, run: _Run, folder: Path) -> None:
        self._run = run
        self._checkpoints = Checkpoints(place_of(str(folder)), keep=1, keep_best=0)
        self._saver = Saver(self._checkpoints, run.ranks, "ab")
        self._step = 0

    def save(self) -> tuple[float, float]:
        self._step += 1
        tensors, state = self._run.state.collect()
        began = time.perf_counter()
        self._saver.save(tensors, Facts(step=self._step, run="", values={"state": state}))
        blocked = time.perf_counter() - began
        written = self._saver.finish()
        if written is None or written.error:
            raise OSError(written and written.error)
        return blocked, time.perf_counter() - began

    def read(self) -> None:
        self._run.state.restore(Saved(self._checkpoints.place, f"step_{self._step:09d}"))


class TorchSave:
    """torch.save of a rank's part."""

    name = "torch.save"

    def __init__(self, run: _Run, folder: Path) -> None:
        self._run, self._path = run, folder / "rank_0.pt"

    def save(self) -> tuple[float, float]:
        began = time.perf_counter()
        with self._path.open("wb") as file:
            torch.save({"weight": self._run.head.weight.detach(), "momentum": self._run.momentum}, file)
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - began,) * 2

    def read(self) -> None:
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            self._run.head.weight.copy_(state["weight"])
        self._run.momentum.copy_(state["momentum"])


class Dcp:
    """torch.distributed.checkpoint in its own format, two threads."""

    name = "torch.distributed.checkpoint"

    def __init__(self, run: _Run, folder: Path) -> None:
        self._run, self._folder = run, folder

    def save(self) -> tuple[float, float]:
        began = time.perf_counter()
        writer = FileSystemWriter(self._folder, thread_count=2, overwrite=True)
        save(self._state(), storage_writer=writer, process_group=self._run.ranks.group)
        return (time.perf_counter() - began,) * 2

    def read(self) -> None:
        load(self._state(), checkpoint_id=self._folder, process_group=self._run.ranks.group)

    def _state(self) -> dict[str, torch.Tensor]:
        return {"weight": self._run.head.weight.detach(), "momentum": self._run.momentum}


_WAYS: dict[str, Callable[[_Run, Path], Ours | TorchSave | Dcp]] = {way.name: way for way in (Ours, TorchSave, Dcp)}


def measure(
    names: Sequence[str], classes: int, dim: int, folder: Path, repeats: int, ranks: Ranks
) -> dict[str, list[Times]]:
    """Times of each way, in turns; the first turn, in which memory is got, is left out."""
    run = _Run(classes, dim, ranks)
    ways = []
    for number, name in enumerate(names):
        (there := folder / str(number)).mkdir()
        ways.append(_WAYS[name](run, there))
    found: dict[str, list[Times]] = {way.name: [] for way in ways}
    for turn in range(repeats + 1):
        for way in ways:
            blocked, written = way.save()
            run.wipe()
            began = time.perf_counter()
            way.read()
            read = time.perf_counter() - began
            if not run.is_back():
                raise RuntimeError(f"{way.name} did not bring the state back")
            if turn:
                found[way.name].append(Times(blocked, written, read))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200_000, help="C")
    parser.add_argument("--dim", type=int, default=512, help="D")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", choices=list(_WAYS), default=list(_WAYS), help="the first is compared with"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; without it the system's temporary folder")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    about = facts(torch.device("cpu"), "benchmarks.checkpoint", sys.argv[1:] if arguments is None else arguments)
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=args.folder))
    try:
        with open_ranks(TrainConfig(device="cpu")) as ranks:
            found = measure(args.ways, args.classes, args.dim, folder, args.repeats, ranks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: Times(*map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}
    first = medians[args.ways[0]]
    size = f"{2 * args.classes * args.dim * 4 / 1e9:.2f} GB"
    texts = [
        (size, name, *(f"{digits(mine)} ({digits(mine / its)} x)" for mine, its in zip(times, first, strict=True)))
        for name, times in medians.items()
    ]
    publish(
        f"Checkpoints: {args.classes} class centres of {args.dim} numbers, and their momentum",
        _HEADER,
        texts,
        about=about | {"figures": f"medians of {args.repeats}; in brackets against the first"},
        rows=[{"way": name, "times": [time._asdict() for time in times]} for name, times in found.items()],
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
