"""Intervals: seeded, of the right width against the binomial's, and each resample keeps folds and kinds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.bootstrap import _resamples, bootstrap
from evaluation.verification import fold_of_pairs, verify
from tests.ijb_cases import Array


def _distances(pairs: int, seed: int = 0) -> tuple[Array, Array]:
    g = np.random.default_rng(seed)
    same = g.random(pairs) < 0.4
    return np.clip(np.where(same, 1.0, 1.7) + 0.3 * g.standard_normal(pairs), 0, 4), same


@pytest.mark.parametrize("pairs", [10, 13, 57])
def test_a_resample_has_the_folds_and_kinds_of_the_set(pairs: int) -> None:
    _, same = _distances(pairs)
    fold = fold_of_pairs(pairs)
    drawn = _resamples(same, 50, np.random.default_rng(0))
    for rows in drawn:
        np.testing.assert_array_equal(same[rows], same)
        np.testing.assert_array_equal(fold[rows], fold)
    assert set(np.concatenate(drawn)) == set(range(pairs)), "every pair is drawn at some time"


def test_intervals_are_seeded_and_hold_the_figures() -> None:
    distances, same = _distances(600)
    first, again, other = (bootstrap(distances, same, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    g = np.random.default_rng(0)
    a = g.standard_normal((600, 8))
    b = np.where(same[:, None], a + 1.1 * g.standard_normal((600, 8)), g.standard_normal((600, 8)))
    result = verify(a, b, same)
    found = bootstrap(2 * (1 - result.scores_P), same, resamples=200)
    assert set(found) == set(result.values()) - {"accuracy_std"}
    for name, (low, high) in found.items():
        assert low <= result.values()[name] <= high


def test_the_width_is_the_binomials() -> None:
    """Pairs that no threshold would part otherwise: accuracy is a mean of independent answers."""
    g = np.random.default_rng(0)
    same = np.arange(4000) % 2 == 0
    wrong = g.random(4000) < 0.1
    found = bootstrap(np.where(same ^ wrong, 0.5, 3.0), same, resamples=400)["accuracy"]
    share = 1 - wrong.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 4000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)
    assert (found.high + found.low) / 2 == pytest.approx(share, abs=half / 3)


def test_parted_pairs_have_no_width() -> None:
    same = np.arange(40) % 2 == 0
    found = bootstrap(np.where(same, 0.5, 3.0), same, resamples=20)
    assert found["accuracy"] == (1, 1)
    assert found["eer"] == (0, 0)


def test_what_is_refused() -> None:
    distances, same = _distances(50)
    with pytest.raises(ValueError, match="2 resamples or more"):
        bootstrap(distances, same, resamples=1)
    with pytest.raises(ValueError, match="a level between 0 and 1"):
        bootstrap(distances, same, level=1)
    with pytest.raises(ValueError, match="at least 10 pairs"):
        bootstrap(distances[:9], np.arange(9) % 2 == 0, resamples=2)
    with pytest.raises(ValueError, match="finite"):
        bootstrap(distances * math.nan, same, resamples=2)
    with pytest.raises(ValueError, match="of one person and of two"):
        bootstrap(distances, same & False, resamples=2)
