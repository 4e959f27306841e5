"""Figures of verification: ROC with a logarithmic FAR, and the scores of both kinds of pairs.

Figures are made without pyplot, so nothing global changes, no display is needed, and threads do not disturb each other.
They suit `save_png` and `drawn` alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image

from data.errors import DataError
from evaluation.roc import Floats, Roc
from evaluation.verification import Verification

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by most colour-blind readers: M. Okabe and K. Ito, Color Universal Design."""
_GENUINE, _IMPOSTOR = _COLOURS[2], _COLOURS[3]
_DASHES = ("-", "--", "-.", ":")
_GRID = "#d9d9d9"
_BINS = 60
_LEAST_SPAN = 0.02
"""Of the scores that are shown: equal ones get a bar of visible width, and not a range of rounding errors."""
_DPI = 150


def verification_figure(results: Mapping[str, Verification], *, title: str) -> Figure:
    """ROC of all results, and below each other the scores of each: what changed, and why.

    results: by the name that the legend shows, such as untrained and trained, in that order.
    Raises ValueError for no results.
    """
    figure = _figure(10, max(4.8, 1.0 + 1.8 * len(results)), title, len(results))
    grid = figure.add_gridspec(len(results), 2, width_ratios=(1.1, 1))
    _draw_roc(figure.add_subplot(grid[:, 0]), {name: result.roc for name, result in results.items()})
    edges = _edges(results.values())
    first: Axes | None = None
    for row, (name, result) in enumerate(results.items()):
        axes = figure.add_subplot(grid[row, 1], sharex=first)
        first = first or axes
        _draw_scores(axes, result, edges, prefix=f"{name}: ", legend=row == 0)
        axes.tick_params(labelbottom=row == len(results) - 1)
    axes.set_xlabel("cosine similarity")
    return figure


def roc_figure(curves: Mapping[str, Roc], *, title: str) -> Figure:
    """TAR against FAR, a curve for each name of the legend. Raises ValueError for no curves."""
    figure = _figure(6.4, 4.8, title, len(curves))
    _draw_roc(figure.add_subplot(), curves)
    return figure


def det_figure(curves: Mapping[str, Roc], *, title: str) -> Figure:
    """The errors of both kinds, 1 - TAR against FAR, both axes logarithmic. Raises ValueError for no curves.

    Left of one impostor pair and below one genuine pair nothing is measured, and nothing is drawn.
    """
    figure = _figure(6.4, 4.8, title, len(curves))
    axes = figure.add_subplot()
    for number, (name, roc) in enumerate(curves.items()):
        far, tar = _corners(roc)
        missed = 1 - tar
        missed[missed * roc.genuine < 0.5] = np.nan
        colour, dash = _style(number)
        axes.step(far, missed, where="post", color=colour, linestyle=dash, linewidth=1.8, label=name)
    lowest_far = min(0.1, *(1 / roc.impostors for roc in curves.values()))
    lowest_missed = min(0.1, *(1 / roc.genuine for roc in curves.values()))
    axes.plot([lowest_far, 1], [lowest_far, 1], color="#999999", linestyle=":", linewidth=1.2, label="equal errors")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lowest_far, 1)
    axes.set_ylim(lowest_missed, 1)
    axes.set_xlabel("FAR: pairs of two persons accepted")
    axes.set_ylabel("1 - TAR: pairs of one person refused")
    axes.legend(loc="best", fontsize=8, framealpha=0.9)
    _tidy(axes)
    return figure


def score_figure(result: Verification, *, title: str) -> Figure:
    """Histogram of the scores of genuine and impostor pairs."""
    figure = _figure(6.4, 4.8, title, 1)
    axes = figure.add_subplot()
    _draw_scores(axes, result, _edges([result]), prefix="", legend=True)
    axes.set_xlabel("cosine similarity")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure; the folder must exist. Raises OSError."""
    figure.savefig(path, format="png", dpi=_DPI)


def label(name: str) -> str:
    """The name of a set or run as a picture shows it: no formula, whatever is in it."""
    shown = str(DataError(name)).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # a legend leaves out what begins so


class Drawn(NamedTuple):
    """A figure as it is shown."""

    pixels: npt.NDArray[np.uint8]
    """(H, W, 3), RGB."""
    png: bytes


def drawn(figure: Figure) -> Drawn:
    """Draw a figure, once for both, as large as `save_png` does."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()  # type: ignore[no-untyped-call]
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, format="PNG")
    return Drawn(pixels, made.getvalue())


def _figure(width: float, height: float, title: str, shown: int) -> Figure:
    if not shown:
        raise ValueError("expected at least one result to draw, got none")
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def _draw_roc(axes: Axes, curves: Mapping[str, Roc]) -> None:
    lowest = min(0.1, *(1 / roc.impostors for roc in curves.values()))
    for number, (name, roc) in enumerate(curves.items()):
        colour, dash = _style(number)
        axes.step(
            *_corners(roc),
            where="post",
            color=colour,
            linestyle=dash,
            linewidth=1.8,
            label=f"{name}: AUC {roc.auc:.4f}, EER {100 * roc.eer:.2f}%",
        )
    chance = np.geomspace(lowest, 1, 200)
    axes.plot(chance, chance, color="#999999", linestyle=":", linewidth=1.2, label="chance")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # on a short axis they would overlap
    axes.set_xlim(lowest, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("FAR: pairs of two persons accepted")
    axes.set_ylabel("TAR: pairs of one person accepted")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="best", fontsize=8, framealpha=0.9)
    _tidy(axes)


def _style(number: int) -> tuple[str, str]:
    """Colour and dashes of a curve: all colours first."""
    return _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]


def _corners(roc: Roc) -> tuple[Floats, Floats]:
    """FAR and TAR where the curve of steps rises, and both ends: the same line, from no more points than genuine pairs.

    Steps, as only whole pairs are accepted; left of one impostor pair nothing is measured.
    """
    measured = roc.far_T * roc.impostors >= 0.5
    far = np.append(1 / roc.impostors, roc.far_T[measured])
    tar = np.append(roc.tar_T[~measured][-1], roc.tar_T[measured])
    rises = np.append(True, tar[1:] > tar[:-1])
    rises[-1] = True
    return far[rises], tar[rises]


def _edges(results: Iterable[Verification]) -> list[float]:
    """Bins for all scores of all results, so that bars of one height are one share of pairs."""
    scores = np.concatenate([result.scores_P for result in results])
    lowest, highest = float(scores.min()), float(scores.max())
    highest = max(highest, min(1.0, (lowest + highest + _LEAST_SPAN) / 2))
    lowest = min(lowest, highest - _LEAST_SPAN)
    return [float(edge) for edge in np.linspace(lowest, highest, _BINS + 1)]


def _draw_scores(axes: Axes, result: Verification, edges: list[float], *, prefix: str, legend: bool) -> None:
    for kind, scores, colour in (
        ("two persons", result.scores_P[~result.same_P], _IMPOSTOR),
        ("one person", result.scores_P[result.same_P], _GENUINE),
    ):
        weights = np.full(len(scores), 1 / len(scores))
        axes.hist(scores, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.45, label=kind)
        axes.hist(scores, edges, weights=weights, histtype="step", color=colour, linewidth=1.2)
    threshold = 1 - float(result.ten_fold.thresholds_F.mean()) / 2
    axes.axvline(threshold, color="#333333", linestyle="--", linewidth=1, label="ten-fold threshold")
    axes.set_ylabel("share of pairs")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"{prefix}accuracy {100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f}%", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if legend:  # in a line of its own above the bars
        axes.set_ylim(0, 1.14 * axes.get_ylim()[1])
        axes.legend(loc="upper center", ncols=3, fontsize=8, edgecolor="none", borderpad=0.2, borderaxespad=0.1)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(True, which="major", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
