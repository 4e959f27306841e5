"""What a run tells: TensorBoard, a JSON line for each log step, and a progress bar with the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

HISTOGRAM_BINS = 64


class RunLog:
    """Rank 0's log of a run. On other ranks every method does nothing."""

    def __init__(self, output: Path, *, active: bool, total_steps: int, first_step: int) -> None:
        self.active = active
        self._total = total_steps
        self._console = Console(stderr=True)
        self._writer: SummaryWriter | None = None
        self._lines: TextIO | None = None
        self._progress: Progress | None = None
        if not active:
            return
        # Events that a killed run logged after its last checkpoint are hidden: the resumed run logs them again.
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._lines = (output / "metrics.jsonl").open("a", encoding="utf-8")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._progress.add_task("starting", total=total_steps, completed=first_step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        if self._lines is not None:
            self._lines.close()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._console.print(text, highlight=False, soft_wrap=True)

    def text(self, tag: str, text: str) -> None:
        if self._writer is not None:
            self._writer.add_text(tag, text)

    def moved(self, step: int) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def scalars(self, step: int, values: Mapping[str, float], headline: str | None = None) -> None:
        """Write scalars; with a headline, show it as well."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        if self._lines is not None:
            record = {"step": step, "time": round(time.time(), 3), **values}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if headline is not None and self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=headline)
        elif headline is not None:
            self.say(f"step {step}/{self._total}  {headline}")

    def histogram(
        self, step: int, tag: str, counts: Tensor, low: float, high: float, sums: tuple[float, float]
    ) -> None:
        """counts (HISTOGRAM_BINS,) of equal bins over [low, high]; sums: of the values and of their squares."""
        if self._writer is None:
            return
        edges = torch.linspace(low, high, len(counts) + 1).tolist()
        self._writer.add_histogram_raw(
            tag, low, high, int(counts.sum()), sums[0], sums[1], edges[1:], counts.tolist(), step
        )

    def figure(self, step: int, tag: str, figure: Any) -> None:
        if self._writer is not None:
            self._writer.add_figure(tag, figure, step)


def count_histogram(values: Tensor, low: float, high: float) -> Tensor:
    """(HISTOGRAM_BINS + 2,) float64: bin counts, then the sum and the sum of squares. Summable over ranks."""
    counts = torch.histc(values.float().clamp(low, high), HISTOGRAM_BINS, low, high)
    sums = torch.stack([values.double().sum(), values.double().square().sum()])
    return torch.cat([counts.double(), sums])
