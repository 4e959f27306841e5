"""The ROC, its area, equal error rate and TAR@FAR equal counting by hand in fractions, and SciPy's statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation.roc import Roc, roc_of, tar_at_far

Scores = npt.NDArray[np.float64]
Truths = npt.NDArray[np.bool_]
Problem = tuple[Scores, Truths]
Point = tuple[Fraction, Fraction]


def _counted(scores: Scores, same: Truths) -> list[tuple[Point, float]]:
    """((FAR, TAR), threshold) of every threshold that differs, from none accepted to all."""
    points = []
    for threshold in [math.inf, *sorted({float(score) for score in scores}, reverse=True)]:
        accepted = [bool(truth) for score, truth in zip(scores, same, strict=True) if score >= threshold]
        far = Fraction(accepted.count(False), int(np.sum(~same)))
        points.append(((far, Fraction(accepted.count(True), int(np.sum(same)))), threshold))
    return points


def _equal_error(points: list[Point]) -> Fraction:
    """Where the lines through the points cross FAR + TAR = 1."""
    for (far, tar), (next_far, next_tar) in pairwise(points):
        if far + tar <= 1 <= next_far + next_tar:
            share = (1 - far - tar) / (next_far + next_tar - far - tar)
            return far + share * (next_far - far)
    raise AssertionError("a ROC ends at (1, 1)")


def _drawn(seed: int, pairs: int, distinct: int) -> Problem:
    """Genuine pairs score higher; few distinct values make many ties."""
    g = np.random.default_rng(seed)
    same = g.random(pairs) < 0.4
    same[:2] = True, False
    return np.round((g.standard_normal(pairs) + 1.3 * same) * distinct) / distinct, same


def _one_false_acceptance(impostors: int) -> Roc:
    """Of few points: an impostor pair scores highest."""
    counts = np.array([0, 1, impostors])
    thresholds = np.array([np.inf, 1.0, 0.0])
    return Roc(
        far_T=counts / impostors, tar_T=np.array([0, 0, 1.0]), threshold_T=thresholds, genuine=1, impostors=impostors
    )


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """Whole scores, so that a transform cannot make two of them equal by rounding."""
    pairs = draw(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
    same = np.array([truth for _, truth in pairs])
    assume(0 < same.sum() < len(same))
    return np.array([score for score, _ in pairs], np.float64), same


CASES: dict[str, Problem] = {
    "no ties": _drawn(0, 60, 10**6),
    "some ties": _drawn(1, 75, 8),
    "many ties": _drawn(2, 90, 1),
    "all equal": (np.full(12, 0.25), np.arange(12) % 3 == 0),
    "parted": (np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])),
    "the wrong way round": (np.array([0.1, 0.2, 0.8, 0.9]), np.array([True, True, False, False])),
    "one pair of each": (np.array([0.5, -0.5]), np.array([False, True])),
    "one of them tied": (np.array([0.5, 0.5]), np.array([False, True])),
    "zeros of both signs": (np.array([0.0, -0.0, 1.0, -1.0]), np.array([True, False, True, False])),
}


@pytest.mark.parametrize("name", CASES)
def test_points_are_those_of_every_threshold(name: str) -> None:
    roc = roc_of(*CASES[name])
    counted = _counted(*CASES[name])
    assert roc.threshold_T.tolist() == [threshold for _, threshold in counted]
    assert roc.far_T.tolist() == [float(far) for (far, _), _ in counted]
    assert roc.tar_T.tolist() == [float(tar) for (_, tar), _ in counted]
    assert (roc.genuine, roc.impostors) == (np.sum(CASES[name][1]), np.sum(~CASES[name][1]))


@pytest.mark.parametrize("name", CASES)
def test_area_is_the_chance_that_a_genuine_pair_scores_higher(name: str) -> None:
    scores, same = CASES[name]
    wins = [(a > b) + 0.5 * (a == b) for a in scores[same] for b in scores[~same]]
    assert roc_of(scores, same).auc == pytest.approx(np.mean(wins), rel=1e-13, abs=1e-15)
    statistic = stats.mannwhitneyu(scores[same], scores[~same]).statistic
    assert roc_of(scores, same).auc == pytest.approx(statistic / len(wins), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_equal_error_rate_is_where_the_lines_cross(name: str) -> None:
    expected = _equal_error([point for point, _ in _counted(*CASES[name])])
    assert roc_of(*CASES[name]).eer == pytest.approx(float(expected), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "auc", "eer"),
    [("parted", 1, 0), ("the wrong way round", 0, 1), ("all equal", 0.5, 0.5), ("one of them tied", 0.5, 0.5)],
)
def test_figures_that_need_no_counting(name: str, auc: float, eer: float) -> None:
    assert (roc_of(*CASES[name]).auc, roc_of(*CASES[name]).eer) == (auc, eer)


@pytest.mark.parametrize("far", [0.01, 0.02, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_tar_is_the_best_of_all_thresholds_whose_far_is_low_enough(name: str, far: float) -> None:
    found = tar_at_far(roc_of(*CASES[name]), far)
    asked = Fraction(str(far))
    if asked * int(np.sum(~CASES[name][1])) < 1:
        assert math.isnan(found.tar)
        return
    # The last of them: of thresholds that are as good, the lowest.
    (_, tar), threshold = [entry for entry in _counted(*CASES[name]) if entry[0][0] <= asked][-1]
    assert (found.far, found.tar, found.threshold, found.reason) == (far, float(tar), threshold, "")


def test_equal_scores_are_accepted_together_or_not_at_all() -> None:
    found = tar_at_far(roc_of(*CASES["all equal"]), 0.5)
    assert (found.tar, found.threshold, found.reason) == (0, math.inf, "")
    assert tar_at_far(roc_of(*CASES["all equal"]), 1).tar == 1


@pytest.mark.parametrize("impostors", [3, 49, 300, 3000, 6000])
def test_a_rate_of_whole_pairs_does_not_lose_one_to_rounding(impostors: int) -> None:
    scores = np.arange(impostors + 1.0)
    roc = roc_of(scores, scores == 0)
    for allowed in range(1, impostors):
        assert tar_at_far(roc, allowed / impostors).threshold == impostors - allowed + 1


# ---- what cannot be measured -------------------------------------------------------------------------------------


def test_a_rate_below_one_pair_gives_no_figure_but_a_reason() -> None:
    found = tar_at_far(roc_of(*CASES["parted"]), 1e-4)
    assert math.isnan(found.tar)
    assert math.isnan(found.threshold)
    assert (found.far, found.reason) == (1e-4, "FAR 0.0001 needs at least 10000 pairs of two persons, there are 2")


def test_as_many_pairs_as_the_reason_asks_for_are_enough() -> None:
    for far in [1 / needed for needed in range(2, 600)] + [0.3, 0.007, 1e-3, 1e-4, 1e-5, 1e-6]:
        needed = int(tar_at_far(_one_false_acceptance(1), far).reason.split()[5])
        assert not tar_at_far(_one_false_acceptance(needed), far).reason
        assert tar_at_far(_one_false_acceptance(needed - 1), far).reason


# ---- properties --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(_problems())
def test_points_never_fall_and_reach_both_corners(problem: Problem) -> None:
    roc = roc_of(*problem)
    steps = np.diff(roc.far_T), np.diff(roc.tar_T)
    assert (steps[0] >= 0).all()
    assert (steps[1] >= 0).all()
    assert (steps[0] + steps[1] > 0).all(), "a point for each distinct score, none twice"
    assert (np.diff(roc.threshold_T) < 0).all()
    assert (roc.far_T[0], roc.tar_T[0], roc.far_T[-1], roc.tar_T[-1]) == (0, 0, 1, 1)
    assert 0 <= roc.eer <= 1


@settings(deadline=None)
@given(_problems(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_rate_never_accepts_less(problem: Problem, one: float, other: float) -> None:
    roc = roc_of(*problem)
    low, high = tar_at_far(roc, min(one, other)), tar_at_far(roc, max(one, other))
    if not low.reason:
        assert low.tar <= high.tar
        assert low.threshold >= high.threshold


@settings(deadline=None)
@given(_problems(), st.floats(0.01, 1))
def test_the_threshold_keeps_to_the_rate_and_gives_the_tar(problem: Problem, far: float) -> None:
    scores, same = problem
    found = tar_at_far(roc_of(scores, same), far)
    if not found.reason:
        assert np.mean(scores[~same] >= found.threshold) <= far * (1 + 1e-12)
        assert np.mean(scores[same] >= found.threshold) == found.tar


@pytest.mark.parametrize("rising", [np.exp, np.arctan, lambda x: x**3, lambda x: 1e6 * x - 7], ids=range(4))
@settings(deadline=None)
@given(problem=_problems())
def test_only_the_order_of_the_scores_counts(rising: Callable[[Scores], Scores], problem: Problem) -> None:
    scores, same = problem
    before, after = roc_of(scores, same), roc_of(rising(scores), same)
    np.testing.assert_array_equal(before.far_T, after.far_T)
    np.testing.assert_array_equal(before.tar_T, after.tar_T)
    np.testing.assert_array_equal(after.threshold_T[1:], rising(before.threshold_T[1:]))


@settings(deadline=None)
@given(_problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_count(problem: Problem, random: Any) -> None:
    scores, same = problem
    order = random.sample(range(len(scores)), len(scores))
    before, after = roc_of(scores, same), roc_of(scores[order], same[order])
    np.testing.assert_array_equal(before.far_T, after.far_T)
    np.testing.assert_array_equal(before.tar_T, after.tar_T)


@settings(deadline=None)
@given(_problems())
def test_area_and_equal_error_rate_in_fractions(problem: Problem) -> None:
    points = [point for point, _ in _counted(*problem)]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    assert roc_of(*problem).auc == pytest.approx(float(area), rel=1e-13, abs=1e-15)
    assert roc_of(*problem).eer == pytest.approx(float(_equal_error(points)), rel=1e-13, abs=1e-15)


@settings(deadline=None)
@given(_problems())
def test_naming_the_kinds_the_other_way_mirrors_the_figures(problem: Problem) -> None:
    scores, same = problem
    roc, mirrored, opposite = roc_of(scores, same), roc_of(-scores, ~same), roc_of(-scores, same)
    assert (mirrored.auc, mirrored.eer) == pytest.approx((roc.auc, roc.eer))
    assert (opposite.auc, opposite.eer) == pytest.approx((1 - roc.auc, 1 - roc.eer))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(far: float) -> None:
    with pytest.raises(ValueError, match=f"0 < FAR <= 1, got {far}"):
        tar_at_far(roc_of(*CASES["parted"]), far)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite values, got 1 that are not"):
        roc_of(np.array([0.1, value, 0.3]), np.array([True, False, True]))


@pytest.mark.parametrize(("scores", "truths"), [((4,), (5,)), ((4,), (4, 1)), ((2, 2), (2, 2)), ((), ())])
def test_other_shapes_are_refused(scores: tuple[int, ...], truths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one value and one truth a pair, got shapes"):
        roc_of(np.ones(scores), np.ones(truths, np.bool_))


def test_truths_of_another_type_than_bool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected bool .*got int64: use astype\(bool\)"):
        roc_of(np.array([0.1, 0.2, 0.3]), np.array([0, 2, 1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("same", "counts"), [([True] * 3, "3 and 0"), ([False] * 2, "0 and 2"), ([], "0 and 0")])
def test_pairs_of_one_kind_are_refused(same: list[bool], counts: str) -> None:
    with pytest.raises(ValueError, match=f"pairs of one person and of two, got {counts}"):
        roc_of(np.zeros(len(same)), np.array(same, np.bool_))
