"""Step time over the number of classes that take part, with the slope that a power law fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.heads.rows import Row

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by most colour-blind readers: M. Okabe and K. Ito, Color Universal Design."""
_MARKERS, _DASHES = ("o", "s"), ("-", "--")  # all classes; sampled ones


def power_law(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """(factor, exponent) of time = factor S^exponent, least squares of the logarithms; None for only one S."""
    sizes, seconds = np.array(points, dtype=np.float64).T
    if len(set(sizes.tolist())) < 2:
        return None
    exponent, logarithm = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(np.exp(logarithm)), float(exponent)


def series(rows: Sequence[Row]) -> dict[tuple[str, bool], list[tuple[int, float]]]:
    """(S, seconds of a step) by head and by whether its classes are sampled, S rising.

    All numbers of classes of a sampled head are one series: where it costs only what it samples, they lie on one line.
    """
    found: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in rows:
        if not row.skipped:
            found.setdefault((row.arm.kind, row.arm.rate < 1), []).append((row.centres, row.median))
    return {key: sorted(points) for key, points in found.items()}


def save_step_plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Points, and the power law that fits them; both axes logarithmic. A slope of 1: the time grows as S does."""
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    found = series(rows)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    for (kind, sampled), points in found.items():
        fitted = power_law(points)
        name = f"{kind}, {'sampled' if sampled else 'all classes'}"
        colour = _COLOURS[kinds.index(kind) % len(_COLOURS)]
        sizes, seconds = zip(*points, strict=True)
        axes.plot(
            sizes,
            seconds,
            color=colour,
            linestyle="",
            marker=_MARKERS[sampled],
            markerfacecolor="white" if sampled else colour,
            label=name if fitted is None else f"{name}: slope {fitted[1]:.2f}",
        )
        if fitted is not None:
            ends = sizes[0], sizes[-1]
            axes.plot(ends, [fitted[0] * end ** fitted[1] for end in ends], color=colour, linestyle=_DASHES[sampled])
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="classes that take part in a step", ylabel="seconds a step")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="both", color="#e5e5e5", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
