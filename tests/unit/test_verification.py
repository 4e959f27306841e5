"""Ten-fold accuracy equals the peer's recorded figures and a plain loop; what goes into it is checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from evaluation import verification
from evaluation.verification import FARS, squared_distances, tar_name, ten_fold_accuracy, verify

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors"
RECORDED: list[dict[str, Any]] = json.loads((VECTORS / "verification.json").read_text(encoding="utf-8"))
Array = npt.NDArray[Any]


def _made_up(
    pairs: int, dim: int, noise: float, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The rule in the fixture's README, vectors not yet of unit length."""
    g = np.random.default_rng(31 + seed + pairs)
    same = g.random(pairs) < 0.5
    first = g.standard_normal((pairs, dim))
    near = first + noise * g.standard_normal((pairs, dim))
    return first, np.where(same[:, None], near, g.standard_normal((pairs, dim))), same


def _plain_ten_fold(distances: Array, same: Array) -> tuple[list[float], list[float]]:
    """Accuracy and threshold of each fold, as the protocol is told: train on nine tenths, answer the tenth."""
    accuracies, thresholds, start = [], [], 0
    for fold in range(10):
        stop = start + len(same) // 10 + (1 if fold < len(same) % 10 else 0)
        tenth = np.arange(start, stop)
        others = np.setdiff1d(np.arange(len(same)), tenth)
        best, most = math.nan, -1
        for step in range(400):
            right = int(np.sum((distances[others] < 0.01 * step) == same[others]))
            if right > most:
                best, most = 0.01 * step, right
        accuracies.append(float(np.mean((distances[tenth] < best) == same[tenth])))
        thresholds.append(best)
        start = stop
    return accuracies, thresholds


# ---- the peer's numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: str(recorded["pairs"]))
def test_every_fold_is_the_peers(recorded: dict[str, Any]) -> None:
    first, second, same = _made_up(recorded["pairs"], recorded["dim"], recorded["noise"], recorded["seed"])
    result = verify(first, second, same)
    assert recorded["pairs"] % 10 == 0
    assert result.ten_fold.accuracies_F.tolist() == recorded["accuracy_folds"]
    assert result.accuracy == pytest.approx(recorded["accuracy_mean"], rel=1e-15)
    assert result.accuracy_std == pytest.approx(recorded["accuracy_std"], rel=1e-13)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: str(recorded["pairs"]))
def test_acceptance_at_fixed_thresholds_is_the_peers(recorded: dict[str, Any]) -> None:
    first, second, same = _made_up(recorded["pairs"], recorded["dim"], recorded["noise"], recorded["seed"])
    distances = squared_distances(first, second)
    for name, threshold, kind in (("tpr_50", 0.5, same), ("tpr_150", 1.5, same), ("fpr_150", 1.5, ~same)):
        folds = zip(np.split(distances, 10), np.split(kind, 10), strict=True)
        assert np.mean([np.mean(d[k] < threshold) for d, k in folds]) == pytest.approx(recorded[name], rel=1e-12)


# ---- ten folds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [10, 11, 13, 19, 20, 57, 101])
def test_folds_are_those_of_a_plain_loop(pairs: int) -> None:
    first, second, same = _made_up(pairs, 6, 1.2)
    distances = squared_distances(first, second)
    accuracies, thresholds = _plain_ten_fold(distances, same)
    found = ten_fold_accuracy(distances, same)
    assert found.accuracies_F.tolist() == accuracies
    assert found.thresholds_F.tolist() == thresholds


def test_distances_on_a_threshold_are_not_below_it() -> None:
    g = np.random.default_rng(0)
    distances = np.arange(400)[g.integers(40, 60, 83)] * 0.01
    same = distances + 0.08 * g.standard_normal(83) < 0.5
    accuracies, thresholds = _plain_ten_fold(distances, same)
    found = ten_fold_accuracy(distances, same)
    assert found.accuracies_F.tolist() == accuracies
    assert found.thresholds_F.tolist() == thresholds
    on_it = ten_fold_accuracy(np.full(10, 25 * 0.01), np.ones(10, np.bool_))
    assert on_it.thresholds_F.tolist() == [26 * 0.01] * 10


def test_the_first_of_equally_good_thresholds_answers() -> None:
    distances, same = np.tile([0.203, 3.0], 10), np.tile([True, False], 10)
    found = ten_fold_accuracy(distances, same)
    assert found.accuracies_F.tolist() == [1.0] * 10
    assert found.thresholds_F.tolist() == [21 * 0.01] * 10  # anything from 0.21 to 3.00 parts them


def test_a_fold_is_answered_by_the_other_nine() -> None:
    # The first tenth is the other way round: a threshold that had seen it could not be wrong on all of it.
    distances, same = np.tile([0.5, 2.0], 50), np.tile([True, False], 50)
    same[:10] = ~same[:10]
    assert ten_fold_accuracy(distances, same).accuracies_F.tolist() == [0.0] + [1.0] * 9


def test_one_kind_of_pairs_has_an_accuracy() -> None:
    distances = np.tile([0.1, 3.9], 10)
    assert ten_fold_accuracy(distances, np.zeros(20, np.bool_)).accuracies_F.tolist() == [1.0] * 10
    assert ten_fold_accuracy(distances, np.zeros(20, np.bool_)).thresholds_F.tolist() == [0.0] * 10
    assert ten_fold_accuracy(distances, np.ones(20, np.bool_)).accuracies_F.tolist() == [1.0] * 10
    assert ten_fold_accuracy(distances, np.ones(20, np.bool_)).thresholds_F.tolist() == [391 * 0.01] * 10


# ---- distances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_every_float_type_are_compared_in_float64(dtype: type) -> None:
    first, second, same = _made_up(120, 16, 1.0)
    first, second = (30 * first).astype(dtype), (0.02 * second).astype(dtype)
    before = first.copy(), second.copy()
    distances = squared_distances(first, second)
    assert distances.dtype == np.float64
    a, b = first.astype(np.float64), second.astype(np.float64)
    cosines = np.sum(a * b, 1) / np.sqrt(np.sum(a * a, 1) * np.sum(b * b, 1))
    np.testing.assert_allclose(distances, 2 - 2 * cosines, rtol=0, atol=1e-14)
    np.testing.assert_allclose(verify(first, second, same).scores_P, cosines, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(first, before[0])
    np.testing.assert_array_equal(second, before[1])


def test_lengths_do_not_matter() -> None:
    first, second, _ = _made_up(50, 8, 1.0)
    lengths = np.logspace(-30, 30, 50)[:, None]
    scaled = squared_distances(first * lengths, second / lengths)
    np.testing.assert_allclose(scaled, squared_distances(first, second), rtol=0, atol=1e-14)


def test_the_two_sides_may_be_swapped() -> None:
    first, second, _ = _made_up(50, 8, 1.0)
    np.testing.assert_array_equal(squared_distances(first, second), squared_distances(second, first))


def test_distances_reach_from_nothing_to_four() -> None:
    x = np.random.default_rng(0).standard_normal((40, 7))
    np.testing.assert_array_equal(squared_distances(x, x), 0)
    np.testing.assert_allclose(squared_distances(x, -3 * x), 4, rtol=1e-14)


def test_interleaved_rows_are_taken_as_they_are() -> None:
    first, second, _ = _made_up(30, 8, 1.0)
    rows = np.empty((60, 8))
    rows[0::2], rows[1::2] = first, second
    np.testing.assert_array_equal(squared_distances(rows[0::2], rows[1::2]), squared_distances(first, second))


@pytest.mark.parametrize("pairs", [10, 21, 28, 30])
def test_any_number_of_pairs_goes_through_the_blocks(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    first, second, _ = _made_up(pairs, 8, 1.0)
    whole = squared_distances(first, second)
    monkeypatch.setattr(verification, "_BLOCK", 7)
    np.testing.assert_array_equal(squared_distances(first, second), whole)


def test_zero_vectors_stay_zero() -> None:
    zero, x = np.zeros((10, 4), np.float32), np.full((10, 4), 3, np.float32)
    np.testing.assert_array_equal(squared_distances(zero, x), 1)
    np.testing.assert_array_equal(squared_distances(zero, -zero), 0)


def test_a_set_of_zero_vectors_is_no_better_than_chance() -> None:
    zero, same = np.zeros((40, 4)), np.arange(40) % 2 == 0
    result = verify(zero, zero, same)
    assert result.accuracy == 0.5
    assert result.roc.auc == 0.5
    assert result.roc.eer == 0.5


# ---- what is reported --------------------------------------------------------------------------------------------


def test_values_name_what_was_measured() -> None:
    first, second, same = _made_up(600, 64, 3.0)
    result = verify(first, second, same)
    assert tuple(entry.far for entry in result.tar_at_far) == FARS
    assert result.roc.impostors == np.count_nonzero(~same) < 1000
    assert list(result.values()) == ["accuracy", "accuracy_std", "auc", "eer", "tar@far=1e-1", "tar@far=1e-2"]
    measured = [entry.tar for entry in result.tar_at_far[:2]]
    assert list(result.values().values()) == [
        *(result.accuracy, result.accuracy_std, result.roc.auc, result.roc.eer),
        *measured,
    ]
    assert [math.isnan(entry.tar) for entry in result.tar_at_far] == [False, False, True, True]
    assert [bool(entry.reason) for entry in result.tar_at_far] == [False, False, True, True]


def test_rates_come_in_the_order_asked_for() -> None:
    first, second, same = _made_up(200, 32, 3.0)
    low, high = verify(first, second, same, fars=(0.02, 0.3)).tar_at_far
    assert (low.far, high.far) == (0.02, 0.3)
    assert low.tar < high.tar
    assert low.threshold > high.threshold


@pytest.mark.parametrize(
    ("far", "name"), [(0.1, "1e-1"), (1e-4, "1e-4"), (0.003, "3e-3"), (0.00025, "2.5e-4"), (1.0, "1e0")]
)
def test_names_of_rates(far: float, name: str) -> None:
    assert tar_name(far) == f"tar@far={name}"


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_fewer_than_ten_pairs_are_refused() -> None:
    first, second, _ = _made_up(9, 4, 1.0)
    same = np.arange(9) % 2 == 0
    with pytest.raises(ValueError, match="at least 10 pairs for ten-fold accuracy, got 9"):
        verify(first, second, same)
    with pytest.raises(ValueError, match="at least 10 pairs for ten-fold accuracy, got 0"):
        ten_fold_accuracy(np.empty(0), np.empty(0, np.bool_))


@pytest.mark.parametrize(("first", "second"), [((12, 4), (12, 5)), ((12, 4), (11, 4)), ((12,), (12,))])
def test_embeddings_of_different_shapes_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \(P, D\), got \(12") as error:
        verify(np.ones(first), np.ones(second), np.arange(12) % 2 == 0)
    assert str(second) in str(error.value)


@pytest.mark.parametrize("truths", [(11,), (13,), (12, 1)])
def test_another_number_of_truths_is_refused(truths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one value and one truth a pair, got shapes \(12,\) and"):
        verify(np.ones((12, 4)), np.ones((12, 4)), np.ones(truths, np.bool_))
    with pytest.raises(ValueError, match=r"one value and one truth a pair, got shapes \(12,\) and"):
        ten_fold_accuracy(np.ones(12), np.ones(truths, np.bool_))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64])
def test_truths_of_another_type_than_bool_are_refused(dtype: type) -> None:
    first, second, same = _made_up(20, 4, 1.0)
    with pytest.raises(ValueError, match=f"expected bool .*got {np.dtype(dtype)}"):
        verify(first, second, same.astype(dtype))
    with pytest.raises(ValueError, match=f"expected bool .*got {np.dtype(dtype)}"):
        ten_fold_accuracy(squared_distances(first, second), same.astype(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_embeddings_that_are_not_finite_are_refused(value: float, side: int) -> None:
    first, second, same = _made_up(20, 4, 1.0)
    (first, second)[side][17, 2] = value
    with pytest.raises(ValueError, match="finite embeddings, got nan or inf"):
        verify(first, second, same)


def test_distances_that_are_not_finite_are_refused() -> None:
    distances = np.ones(20)
    distances[[3, 8]] = math.nan
    with pytest.raises(ValueError, match="finite values, got 2 that are not"):
        ten_fold_accuracy(distances, np.arange(20) % 2 == 0)


@pytest.mark.parametrize("kind", [True, False])
def test_pairs_of_one_kind_are_refused(kind: bool) -> None:
    first, second, same = _made_up(20, 4, 1.0)
    with pytest.raises(ValueError, match=f"of one person and of two, got {20 * kind} and {20 - 20 * kind}"):
        verify(first, second, np.full_like(same, kind))
