"""What a run tells: TensorBoard, a JSON line for each log step, and a progress bar with the time left."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data.contact_sheet import Pixels
from training.showing.layout import Layout
from training.sinks import Sinks

HISTOGRAM_BINS = 64


def append_line(path: Path, text: str) -> None:
    """Append a line, behind the end of one that a full disk cut short. Raises OSError."""
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        torn = False
        if size:
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + text.encode() + b"\n")


class RunLog:
    """Rank 0's log of a run. On other ranks every method does nothing.

    What cannot be written (a full disk, a folder that is gone) is said once and never ends a training: it is tried
    again with the next lines, and what was not written meanwhile is missing.
    """

    def __init__(
        self,
        output: Path,
        *,
        active: bool,
        total_steps: int,
        first_step: int,
        layout: Layout | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        """layout: of TensorBoard's page of custom scalars; None: it has no such page. sinks: other places, which are
        told scalars and curves; who gives them starts them, `close` ends them.
        """
        self.active, self._layout, self._sinks = active, layout, sinks or Sinks()
        self._total = total_steps
        self._console = Console(stderr=True)
        self._output, self._failing = output, set[str]()
        self._writer: SummaryWriter | None = None
        self._progress: Progress | None = None
        if not active:
            return
        # Events that a killed run logged after its last checkpoint are hidden: the resumed run logs them again.
        self._purge = first_step + 1 if first_step else None
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

    def close(self, *, failed: bool = False) -> None:
        """failed: the training ended by an error; one that is on its way is seen."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self.attempt("tensorboard", self._writer.close)
        self._sinks.close(failed=failed or sys.exc_info()[0] is not None)

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Write something, and say it if that is not possible: whether it was."""
        if not self.active:
            return False
        try:
            write()
        except (OSError, RuntimeError, ValueError) as error:
            if what not in self._failing:
                self._failing.add(what)
                self.say(f"{self._output / what}: cannot write it ({error}): training goes on, and tries it again")
            return False
        if what in self._failing:
            self._failing.remove(what)
            self.say(f"{self._output / what}: it can be written again")
        return True

    def _events(self, write: Callable[[SummaryWriter], None]) -> None:
        """Hand something to TensorBoard's writer. One that has failed is of no more use: another takes its place."""

        def attempt() -> None:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._output / "tensorboard"), purge_step=self._purge)
                self._purge = None
                if self._layout is not None:
                    self._writer.add_custom_scalars(self._layout)
            write(self._writer)

        if not self.attempt("tensorboard", attempt):
            self._writer = None

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def text(self, tag: str, text: str) -> None:
        self._events(lambda writer: writer.add_text(tag, text))

    def moved(self, step: int) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def scalars(self, step: int, values: Mapping[str, float], headline: str | None = None) -> None:
        """Write scalars; with a headline, show it as well."""

        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

        self._events(write)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no nan
        record = {"step": step, "time": round(time.time(), 3), **finite}
        self.attempt("metrics.jsonl", lambda: append_line(self._output / "metrics.jsonl", json.dumps(record)))
        self._sinks.scalars(step, values)
        if headline is not None and self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=headline)
        elif headline is not None:
            self.say(f"step {step}/{self._total}  {headline}")

    def histogram(
        self, step: int, tag: str, counts: Tensor, low: float, high: float, sums: tuple[float, float]
    ) -> None:
        """counts (HISTOGRAM_BINS,) of equal bins over [low, high]; sums: of the values and of their squares."""
        edges = torch.linspace(low, high, len(counts) + 1).tolist()
        number = int(counts.sum())
        self._events(
            lambda writer: writer.add_histogram_raw(
                tag, low, high, number, sums[0], sums[1], edges[1:], counts.tolist(), step
            )
        )

    def image(self, step: int, tag: str, picture: Pixels, *, elsewhere: bool = False) -> None:
        """picture: uint8 (H, W, 3), RGB. elsewhere: at other places too, as no face is in it."""
        self._events(lambda writer: writer.add_image(tag, picture, step, dataformats="HWC"))
        if elsewhere:
            self._sinks.picture(step, tag, picture)

    def embedding(
        self, step: int, x_ND: npt.NDArray[Any], labels: Sequence[object], tag: str, pictures_N3HW: Tensor
    ) -> None:
        """Points of the embedding projector. labels: one for each. pictures_N3HW: square ones, 0 … 1."""

        def write(writer: SummaryWriter) -> None:
            with contextlib.redirect_stdout(io.StringIO()):  # of a folder that is there: a finished run, run again
                writer.add_embedding(x_ND, list(labels), pictures_N3HW, step, tag)

        self._events(write)


def count_histogram(values: Tensor, low: float, high: float) -> Tensor:
    """(HISTOGRAM_BINS + 2,) float64: bin counts, then the sum and the sum of squares. Summable over ranks."""
    counts = torch.histc(values.float().clamp(low, high), HISTOGRAM_BINS, low, high)
    sums = torch.stack([values.double().sum(), values.double().square().sum()])
    return torch.cat([counts.double(), sums])
