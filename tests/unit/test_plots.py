"""Figures of verification show every result, point and score they were given, and are saved at the size they state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from evaluation.plots import det_figure, roc_figure, save_png, score_figure, verification_figure
from evaluation.roc import Roc, roc_of
from evaluation.verification import TenFold, Verification, verify


def _result(pairs: int, noise: float, *, dim: int = 24, common: float = 0.0) -> Verification:
    """Alternately one person and two; `common` moves all embeddings one way, as an untrained network does."""
    g = np.random.default_rng(pairs)
    same = np.arange(pairs) % 2 == 0
    first, other = g.standard_normal((2, pairs, dim))
    second = np.where(same[:, None], first + noise * g.standard_normal((pairs, dim)), other)
    return verify(first + common, second + common, same)


def _identical(pairs: int) -> Verification:
    x = np.ones((pairs, 4))
    return verify(x, x, np.arange(pairs) % 2 == 0)


def _curves(axes: Axes) -> list[Line2D]:
    """Without the line of chance."""
    return [line for line in axes.lines if line.get_label() != "chance"]


def _legend(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def _step(far: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Height of a curve of steps: that of the last point at or left of `far`."""
    return float(ys[np.searchsorted(xs, far, side="right") - 1])


def _shares(axes: Axes) -> list[float]:
    """Sum of the bars of each filled histogram, from its outline: up, across, down."""
    sums = []
    for patch in axes.patches:
        if patch.get_fill():
            xy = patch.get_xy()
            bars = len(xy) // 4  # edges twice upwards on top, twice back at the bottom
            sums.append(float(xy[1 : 2 * bars + 1 : 2, 1].sum()))
    return sums


# ---- ROC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_curve_for_each_name(count: int) -> None:
    curves = {f"epoch {number}": _result(60 + 2 * number, 1.5).roc for number in range(count)}
    (axes,) = roc_figure(curves, title="held-out pairs").axes
    assert len(_curves(axes)) == count
    assert len(axes.lines) == count + 1
    names = [f"{name}: AUC {roc.auc:.4f}, EER {100 * roc.eer:.2f}%" for name, roc in curves.items()]
    assert _legend(axes) == [*names, "chance"]
    looks = {(line.get_color(), line.get_linestyle()) for line in _curves(axes)}
    assert len(looks) == count, "no two curves look alike"


@pytest.mark.parametrize("distinct", [2, 10, 10**6])
def test_the_curve_goes_through_every_measured_point(distinct: int) -> None:
    result = _result(400, 2.0)
    roc = roc_of(np.round(result.scores_P * distinct) / distinct, result.same_P)
    (curve,) = _curves(roc_figure({"a": roc}, title="").axes[0])
    assert curve.get_drawstyle() == "steps-post"
    xs, ys = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    for allowed in range(1, roc.impostors + 1):
        far = allowed / roc.impostors
        reached = roc.tar_T[roc.far_T <= far + 1e-9].max()
        assert _step(far + 1e-9, xs, ys) == reached
    assert xs[0] == 1 / roc.impostors, "nothing is measured left of one pair"
    assert ys[0] == roc.tar_T[roc.far_T == 0].max()
    assert (xs[-1], ys[-1]) == (1, 1)


def test_points_that_the_line_does_not_need_are_not_drawn() -> None:
    scores = np.random.default_rng(0).standard_normal(20_000)
    same = np.arange(20_000) < 50
    scores[same] += 2
    roc = roc_of(scores, same)
    (curve,) = _curves(roc_figure({"a": roc}, title="").axes[0])
    assert len(roc.far_T) == 20_001
    assert len(curve.get_xdata()) <= 52


def test_the_axis_reaches_from_one_impostor_pair_to_all() -> None:
    curves = {"small": _result(40, 1.5).roc, "large": _result(2000, 1.5).roc}
    (axes,) = roc_figure(curves, title="").axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1 / 1000, 1)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1
    starts = [np.asarray(line.get_xdata())[0] for line in _curves(axes)]
    assert starts == [1 / 20, 1 / 1000]


def test_one_impostor_pair_gives_a_curve() -> None:
    (axes,) = roc_figure({"a": roc_of(np.array([0.1, 0.3]), np.array([False, True]))}, title="").axes
    (curve,) = _curves(axes)
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [(1, 1), (1, 1)]
    assert axes.get_xlim() == (0.1, 1)


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [_result(10, 1.5), _result(600, 1.5), _result(60, 1.5, common=50.0), _identical(10), _result(30, 0.0)],
    ids=["ten pairs", "many", "collapsed", "identical", "genuine pairs identical"],
)
def test_every_score_is_in_a_bar(result: Verification) -> None:
    (axes,) = score_figure(result, title="").axes
    assert _shares(axes) == pytest.approx([1, 1])
    low, high = axes.get_xlim()
    assert low <= result.scores_P.min()
    assert high >= result.scores_P.max()


def test_bars_are_the_counts_of_the_scores() -> None:
    result = _result(600, 1.5)
    (axes,) = score_figure(result, title="").axes
    impostors, genuine = (patch.get_xy() for patch in axes.patches if patch.get_fill())
    for outline, scores in ((impostors, result.scores_P[~result.same_P]), (genuine, result.scores_P[result.same_P])):
        bars = len(outline) // 4
        edges, heights = outline[0 : 2 * bars + 1 : 2, 0], outline[1 : 2 * bars + 1 : 2, 1]
        np.testing.assert_allclose(heights, np.histogram(scores, edges)[0] / len(scores), atol=1e-15)


def test_the_threshold_stands_where_the_answer_turns() -> None:
    result = _result(600, 1.5)
    (axes,) = score_figure(result, title="LFW").axes
    (line,) = axes.lines
    # Unit vectors: a squared distance d is a cosine of 1 - d / 2.
    assert np.asarray(line.get_xdata())[0] == pytest.approx(np.mean(1 - result.ten_fold.thresholds_F / 2))
    assert _legend(axes) == ["two persons", "one person", "ten-fold threshold"]
    assert axes.get_title() == f"accuracy {100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f}%"


def test_equal_scores_are_not_shown_beyond_the_largest_cosine() -> None:
    (axes,) = score_figure(_identical(20), title="").axes
    outlines = [patch.get_xy()[:, 0] for patch in axes.patches]
    assert max(xs.max() for xs in outlines) <= 1
    assert all(xs.max() - xs.min() > 0.01 for xs in outlines), "a range one can see"


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_roc_and_the_scores_of_each_result(count: int) -> None:
    results = {f"epoch {number}": _result(60 + 20 * number, 3.0 - 0.5 * number) for number in range(count)}
    figure = verification_figure(results, title="demo")
    roc, *scores = figure.axes
    assert len(_curves(roc)) == len(scores) == count
    assert figure.get_suptitle() == "demo"
    for axes, (name, result) in zip(scores, results.items(), strict=True):
        assert axes.get_title().startswith(f"{name}: accuracy {100 * result.accuracy:.2f}")
        assert _shares(axes) == pytest.approx([1, 1])
    assert [bool(_legend(axes)) for axes in scores] == [True] + [False] * (count - 1)
    assert [axes.get_xlabel() for axes in scores] == [""] * (count - 1) + ["cosine similarity"]


def test_scores_of_all_results_share_axis_and_bins() -> None:
    result = _result(60, 3.0)
    # A network that knows nothing may accept nobody: a threshold right of all scores.
    nobody = replace(result, ten_fold=TenFold(result.ten_fold.accuracies_F, np.zeros(10)))
    figure = verification_figure({"before": nobody, "after": _result(80, 1.0)}, title="")
    before, after = figure.axes[1:]
    assert before.get_xlim() == after.get_xlim()
    edges = [np.unique(patch.get_xy()[:, 0]) for axes in (before, after) for patch in axes.patches if patch.get_fill()]
    for other in edges[1:]:
        np.testing.assert_array_equal(other, edges[0])


@pytest.mark.parametrize("count", [1, 6])
def test_no_labels_overlap(count: int) -> None:
    figure = verification_figure({f"epoch {number}": _identical(10) for number in range(count)}, title="a set")
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text for text in axes.get_xticklabels() + axes.get_xticklabels(minor=True) if text.get_text()]
        boxes = sorted((text.get_window_extent() for text in labels if text.get_visible()), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    sides = [axes.yaxis.label.get_window_extent() for axes in figure.axes[1:]]
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(sides))


# ---- files -------------------------------------------------------------------------------------------------------


FIGURES: dict[str, tuple[Callable[[], Figure], tuple[int, int]]] = {
    "ROC": (lambda: roc_figure({"a": _result(10, 1.5).roc, "b": _identical(10).roc}, title="a"), (960, 720)),
    "scores": (lambda: score_figure(_result(10, 1.5), title="a"), (960, 720)),
    "identical scores": (lambda: score_figure(_identical(10), title="a"), (960, 720)),
    "two": (lambda: verification_figure({"a": _identical(10), "b": _result(10, 1.5)}, title="a"), (1500, 720)),
    "six": (lambda: verification_figure(dict.fromkeys("abcdef", _result(10, 1.5)), title="a"), (1500, 1770)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_saved_figure_is_a_readable_png(name: str, tmp_path: Path) -> None:
    make, size = FIGURES[name]
    save_png(make(), tmp_path / "figure.of.a.run")  # PNG whatever the file is called
    with Image.open(tmp_path / "figure.of.a.run") as image:
        assert (image.format, image.size) == ("PNG", size)
        pixels = np.asarray(image.convert("RGB"), int)
    assert (pixels[0] == 255).all(), "white around it"
    assert (np.ptp(pixels, axis=2) > 60).sum() > 200, "colours in it"


def test_figures_are_made_in_threads_and_leave_no_trace() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    result, curves = _result(40, 1.5), []
    threads = [
        threading.Thread(target=lambda: curves.append(len(verification_figure({"a": result}, title="").axes)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert curves == [2] * 4
    assert dict(matplotlib.rcParams) == before


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_the_det_curve_is_what_the_roc_leaves_out() -> None:
    roc = _result(60, 3.0).roc
    (axes,) = det_figure({"a": roc, "b": _identical(10).roc}, title="").axes
    missed, none_missed, equal = axes.get_lines()
    far, share = (np.asarray(side, float) for side in missed.get_data())
    drawn = np.isfinite(share)
    points = set(zip(roc.far_T.tolist(), (1 - roc.tar_T).tolist(), strict=True))
    found = list(zip(far[drawn].tolist(), share[drawn].tolist(), strict=True))
    assert len(found) > 3
    assert set(found[1:]) <= points, "the first stands on the left border"
    assert [line.get_label() for line in (missed, none_missed, equal)] == ["a", "b", "equal errors"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(ValueError, match="at least one result"):
        det_figure({}, title="")


def test_nothing_to_draw_is_refused() -> None:
    no_results: dict[str, Verification] = {}
    no_curves: dict[str, Roc] = {}
    with pytest.raises(ValueError, match="at least one result to draw, got none"):
        verification_figure(no_results, title="")
    with pytest.raises(ValueError, match="at least one result to draw, got none"):
        roc_figure(no_curves, title="")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        save_png(score_figure(_result(10, 1.5), title=""), tmp_path / "missing" / "scores.png")
