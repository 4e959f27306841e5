"""Time of k-means over points, a line for each number of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.heads.plot import _COLOURS

_MARKERS = "osD^v<>PX*"


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
    """A panel for each kind of data, both axes logarithmic; a way has a colour, a number of clusters a marker."""
    kinds, ways = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("data", "way"))
    clusters = sorted({row.clusters for row in rows})
    figure = Figure(figsize=(1 + 4.4 * len(kinds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for way, colour in zip(ways, _COLOURS * len(ways), strict=False):
            for K, marker in zip(clusters, _MARKERS * len(clusters), strict=False):
                found = sorted((r.points, r.median) for r in rows if (r.data, r.way, r.clusters) == (kind, way, K))
                if found:
                    panel.plot(*zip(*found, strict=True), marker=marker, color=colour, label=f"{way}, K = {K:,}")
        panel.set(xscale="log", yscale="log", title=kind, xlabel="N")
        panel.set_xticks(sorted({row.points for row in rows}))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda points, _: f"{points:,.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(visible=True, which="both", color="#e5e5e5", linewidth=0.6)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("seconds")
    figure.suptitle(title)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
