"""What a k-means job shows on its way: bars on a terminal, a line for each iteration elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clustering.job.job import Step


class Display:
    """Rank 0 shows, the others do nothing; all on stderr."""

    def __init__(self, is_main: bool, iterations: int) -> None:
        """iterations: at most."""
        self._is_main, self._iterations = is_main, iterations
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = is_main and self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, disable=not shown, transient=True)
        self._rows = 0
        self._seconds: list[float] = []

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def reading(self, rows: int) -> Iterator[Callable[[int], None]]:
        """A bar over the rows of this rank; gives what is called with the number of rows read."""
        task = self._progress.add_task("reading rows", total=rows)
        yield lambda read: self._progress.advance(task, read)
        self._progress.remove_task(task)

    def about(self, rows: int, dim: int, clusters: int, zero_rows: int) -> None:
        """What is clustered, before the iterations."""
        self._rows = rows
        zero = f", {zero_rows} of them zero and left out" if zero_rows else ""
        self._say(f"{rows:,} rows of {dim} components{zero}; {clusters:,} clusters")
        self._task = self._progress.add_task("iterations", total=self._iterations)

    def step(self, step: Step) -> None:
        """After an iteration."""
        self._progress.update(self._task, completed=step.iteration)
        self._seconds.append(step.seconds)
        left = (self._iterations - step.iteration) * sum(self._seconds) / len(self._seconds)
        parts = [
            f"iteration {step.iteration} of {self._iterations}: mean cosine {step.mean_cosine:.5f}",
            "" if step.moved is None else f"{step.moved:,} moved",
            f"{step.empty:,} empty" if step.empty else "",
            f"{step.rebuilt:,} merged and split" if step.rebuilt else "",
            f"{self._rows / max(step.seconds, 1e-3):,.0f} rows/s",
            f"at most {_span(left)} left",
        ]
        self._say(", ".join(part for part in parts if part))

    def _say(self, text: str) -> None:
        if self._is_main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
