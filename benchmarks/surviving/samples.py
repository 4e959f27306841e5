"""What a process holds while it lives: memory, open files, threads; sampled, compared early against late, drawn."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WARM_UP = 0.2
"""Share of the time in which memory is still got."""
_MOST_GROWTH = 0.05


class Sample(NamedTuple):
    """Of one rank at one moment, in seconds since the first."""

    seconds: float
    rank: int
    megabytes: float
    """Resident."""
    descriptors: int
    threads: int
    files: int
    """In the folders of the training."""


class Growth(NamedTuple):
    """Medians of the first and of the last quarter after the warm-up."""

    what: str
    first: float
    last: float
    is_too_much: bool


class Sampler:
    """Samples processes from a thread; a context manager."""

    def __init__(self, ranks: Mapping[int, int], folders: Sequence[Path], every_s: float) -> None:
        self.samples: list[Sample] = []
        self._ranks, self._folders, self._every_s = ranks, folders, every_s
        self._begin, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            files = sum(len(names) for folder in self._folders for *_, names in os.walk(folder))
            for rank, pid in self._ranks.items():
                with contextlib.suppress(OSError):  # it has ended: whoever waits for it says so
                    self.samples.append(Sample(time.monotonic() - self._begin, rank, *_held(pid), files))


def _held(pid: int) -> tuple[float, int, int]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    values = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    return values["VmRSS"] / 1024, len(os.listdir(f"/proc/{pid}/fd")), values["Threads"]


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of each rank: memory, descriptors, threads; and of the files, which may come and go."""
    if not samples:
        return []
    end = samples[-1].seconds
    start = WARM_UP * end
    quarter = (end - start) / 4
    found = []
    for rank in sorted({sample.rank for sample in samples}):
        own = [sample for sample in samples if sample.rank == rank]
        first = [sample for sample in own if start <= sample.seconds <= start + quarter]
        last = [sample for sample in own if sample.seconds >= end - quarter]
        if not (first and last):
            continue
        early, late = (
            [statistics.median(column) for column in list(zip(*some, strict=True))[2:]] for some in (first, last)
        )
        limits = (early[0] * (1 + _MOST_GROWTH), early[1], early[2], float("inf"))
        names = ("MB resident", "open descriptors", "threads", "files in its folders")
        for what, a, b, limit in list(zip(names, early, late, limits, strict=True))[: 4 if rank == 0 else 3]:
            found.append(Growth(f"{what}, rank {rank}" if limit < float("inf") else what, a, b, b > limit))
    return found


def save_plot(samples: Sequence[Sample], faults: Sequence[tuple[float, str]], path: Path) -> None:
    """Lines for each rank over the minutes; faults (seconds, kind) as marks below."""
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[3, 1.5, 1.5, 2])
    colours = ("#0072b2", "#d55e00")
    for panel, column, name in zip(panels, (2, 3, 4), ("MB resident", "descriptors", "threads"), strict=False):
        for rank in sorted({sample.rank for sample in samples}):
            own = [sample for sample in samples if sample.rank == rank]
            minutes = [sample.seconds / 60 for sample in own]
            panel.plot(minutes, [sample[column] for sample in own], color=colours[rank % 2], lw=1, label=f"rank {rank}")
        panel.set_ylabel(name)
        panel.axvspan(0, WARM_UP * samples[-1].seconds / 60, color="0.9")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="lower right")
    panels[0].set_title("Two ranks that live through faults (grey: warm-up)")
    kinds = sorted({kind for _, kind in faults})
    panels[3].scatter([s / 60 for s, _ in faults], [kinds.index(kind) for _, kind in faults], marker="|", color="black")
    panels[3].set_yticks(range(len(kinds)), kinds, fontsize=7)
    panels[3].set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)
