"""Intervals of verification figures by the bootstrap, pair by pair and seeded.

Legend: P pairs, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.roc import Bools, Floats, check_pairs, roc_of, tar_at_far
from evaluation.verification import FARS, FOLDS, fold_of_pairs, tar_name, ten_fold_accuracy

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


def bootstrap(
    distances_P: Floats,
    same_P: Bools,
    *,
    fars: Sequence[float] = FARS,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of the names in `Verification.values`, less accuracy_std.

    distances_P: squared distances of unit vectors (`squared_distances`). Each resample puts in every pair's place one
    drawn, with replacement, from the pairs of its fold and its kind, and computes everything anew, the ten thresholds
    too. So each fold keeps its size and its share of genuine pairs, no pair is in two folds, and every rate stays
    measurable. The interval reaches from the (1 - level) / 2 quantile of the R figures to the (1 + level) / 2 one
    (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, chapter 13). Pairs that share an image or a person are
    drawn as if they did not: for new persons the truth is wider. The same seed gives the same intervals.

    Raises ValueError as `verify` does, for fewer than two resamples, and a level outside (0, 1).
    """
    check_pairs(distances_P, same_P)
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"expected 2 resamples or more and a level between 0 and 1, got {resamples} and {level}")
    rng = np.random.default_rng(seed)
    drawn = [_figures(distances_P[row_P], same_P, fars) for row_P in _resamples(same_P, resamples, rng)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: Interval(*(float(value) for value in np.quantile([figures[name] for figures in drawn], tails)))
        for name in drawn[0]
    }


def _resamples(same_P: Bools, resamples: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Rows (P,) of each resample: row p is of the fold and kind of pair p."""
    kind_P = 2 * fold_of_pairs(len(same_P)) + same_P
    order_P = np.argsort(kind_P, kind="stable")
    sizes = np.bincount(kind_P, minlength=2 * FOLDS)
    starts = np.cumsum(sizes) - sizes
    return [order_P[starts[kind_P] + rng.integers(0, sizes[kind_P])] for _ in range(resamples)]


def _figures(distances_P: Floats, same_P: Bools, fars: Sequence[float]) -> dict[str, float]:
    roc = roc_of(1 - distances_P / 2, same_P)
    tars = (tar_at_far(roc, far) for far in fars)
    accuracy = float(ten_fold_accuracy(distances_P, same_P).accuracies_F.mean())
    measured = {tar_name(entry.far): entry.tar for entry in tars if not entry.reason}
    return {"accuracy": accuracy, "auc": roc.auc, "eer": roc.eer, **measured}
