"""Time of k-means over points times clusters, with the slope that a power law fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.plot import _COLOURS, power_law


class Timed(Protocol):
    """A row of the benchmark."""

    @property
    def data(self) -> str: ...
    @property
    def way(self) -> str: ...
    @property
    def points(self) -> int: ...
    @property
    def clusters(self) -> int: ...
    @property
    def median(self) -> float: ...


def save_scaling_plot(rows: Sequence[Timed], path: Path, *, title: str) -> None:
    """A panel for each kind of data, both axes logarithmic. A slope of 1: the time grows as N K does."""
    kinds, ways = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("data", "way"))
    figure = Figure(figsize=(1 + 4.4 * len(kinds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for number, way in enumerate(ways):
            found = sorted((r.points * r.clusters, r.median) for r in rows if (r.data, r.way) == (kind, way))
            fitted = power_law(found)
            name = way if fitted is None else f"{way}: slope {fitted[1]:.2f}"
            sizes, seconds = zip(*found, strict=True)
            panel.plot(sizes, seconds, "o", color=_COLOURS[number % len(_COLOURS)], label=name)
            if fitted is not None:
                ends = sizes[0], sizes[-1]
                line = [fitted[0] * end ** fitted[1] for end in ends]
                panel.plot(ends, line, color=_COLOURS[number % len(_COLOURS)])
        panel.set(xscale="log", yscale="log", title=kind, xlabel="N K")
        panel.grid(visible=True, which="both", color="#e5e5e5", linewidth=0.6)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("seconds")
    figure.suptitle(title)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
