"""Verification as the field reports it: is this pair one person? Ten-fold accuracy, TAR@FAR, AUC, EER; in float64.

Legend: P pairs, D components of an embedding, F folds, K thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.roc import Bools, Floats, Roc, TarAtFar, check_pairs, roc_of, tar_at_far

FOLDS = 10
"""The field's protocol, and so the least number of pairs."""

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
"""False acceptance rates that are reported; a set of 6000 pairs measures down to 1 / 3000."""

_THRESHOLDS_K = np.arange(0, 4, 0.01)
"""Squared distances between unit vectors, 0 … 4, as the peers step through them."""

_BLOCK = 4096
"""Pairs converted to float64 at a time: 16 MB for an embedding of 512."""


class TenFold(NamedTuple):
    """accuracies_F: share of right answers in each fold. thresholds_F: the squared distance each was answered by."""

    accuracies_F: Floats
    thresholds_F: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Verification:
    """What a set of pairs says about embeddings."""

    ten_fold: TenFold
    tar_at_far: tuple[TarAtFar, ...]
    """In the order of the rates asked for."""
    roc: Roc
    scores_P: Floats
    """Cosine of each pair; as the distances have it, 0.5 where one embedding is zero and 1 where both are."""
    same_P: Bools

    @property
    def accuracy(self) -> float:
        """Mean over the ten folds."""
        return float(self.ten_fold.accuracies_F.mean())

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over the ten folds (not of their mean), as the field reports it."""
        return float(self.ten_fold.accuracies_F.std())

    def values(self) -> dict[str, float]:
        """Figures by name, for a log; a TAR@FAR that cannot be measured is left out."""
        tars = {tar_name(entry.far): entry.tar for entry in self.tar_at_far if not math.isnan(entry.tar)}
        means = {"accuracy": self.accuracy, "accuracy_std": self.accuracy_std}
        return {**means, "auc": self.roc.auc, "eer": self.roc.eer, **tars}


def tar_name(far: float) -> str:
    """Name of a TAR@FAR in `Verification.values`: 0.001 gives tar@far=1e-3."""
    mantissa, exponent = f"{far:e}".split("e")
    return f"tar@far={float(mantissa):g}e{int(exponent)}"


def verify(
    first_PD: npt.NDArray[Any], second_PD: npt.NDArray[Any], same_P: Bools, *, fars: Sequence[float] = FARS
) -> Verification:
    """Compare the embeddings of P pairs.

    first_PD, second_PD: floating point, of any length; they are scaled to unit length here. same_P: bool, whether the
    pair shows one person. Raises ValueError for fewer than 10 pairs, pairs of one kind only, values not finite, and
    truths that are not bool.
    """
    distances_P = squared_distances(first_PD, second_PD)
    scores_P = 1 - distances_P / 2
    roc = roc_of(scores_P, same_P)
    return Verification(
        ten_fold=ten_fold_accuracy(distances_P, same_P),
        tar_at_far=tuple(tar_at_far(roc, far) for far in fars),
        roc=roc,
        scores_P=scores_P,
        same_P=same_P,
    )


def squared_distances(first_PD: npt.NDArray[Any], second_PD: npt.NDArray[Any]) -> Floats:
    """Squared distance between the two unit vectors of each pair, float64 (P,), 0 … 4; a zero vector stays zero.

    Raises ValueError when the shapes differ or a value is not finite.
    """
    if first_PD.ndim != 2 or first_PD.shape != second_PD.shape:
        raise ValueError(f"expected two arrays of one shape (P, D), got {first_PD.shape} and {second_PD.shape}")
    distances_P = np.empty(len(first_PD))
    for start in range(0, len(first_PD), _BLOCK):
        rows = slice(start, start + _BLOCK)
        difference = _unit(first_PD[rows]) - _unit(second_PD[rows])
        distances_P[rows] = np.einsum("pd,pd->p", difference, difference)
    return distances_P


def _unit(x_PD: npt.NDArray[Any]) -> Floats:
    x = x_PD.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("expected finite embeddings, got nan or inf: has the training diverged?")
    length_P1 = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length_P1 > 0, length_P1, 1))


def ten_fold_accuracy(distances_P: Floats, same_P: Bools) -> TenFold:
    """Accuracy on each tenth of the pairs, in their order, by the first threshold that is best on the other nine.

    A pair counts as one person when its squared distance is below the threshold; the first P % 10 folds hold one pair
    more. O(P log K). Raises ValueError for fewer than 10 pairs, distances not finite, and truths that are not bool.
    """
    check_pairs(distances_P, same_P)
    total = len(distances_P)
    if total < FOLDS:
        raise ValueError(f"expected at least {FOLDS} pairs for ten-fold accuracy, got {total}: add pairs to the set")
    fold_P = fold_of_pairs(total)
    # A pair is accepted from the first threshold above its distance on; at K, by none.
    first_P = np.searchsorted(_THRESHOLDS_K, distances_P, side="right")
    bins = len(_THRESHOLDS_K) + 1

    def below_FK(kind_P: Bools) -> npt.NDArray[np.int64]:
        """How many pairs of a kind each fold accepts at each threshold."""
        counts = np.bincount(fold_P[kind_P] * bins + first_P[kind_P], minlength=FOLDS * bins)
        return counts.reshape(FOLDS, bins).cumsum(axis=1)[:, :-1]

    impostors_F = np.bincount(fold_P[~same_P], minlength=FOLDS)
    right_FK = below_FK(same_P) + impostors_F[:, None] - below_FK(~same_P)
    best_F = np.argmax(right_FK.sum(axis=0) - right_FK, axis=1)
    accuracies_F = right_FK[np.arange(FOLDS), best_F] / np.bincount(fold_P)
    return TenFold(accuracies_F, _THRESHOLDS_K[best_F])


def fold_of_pairs(total: int) -> npt.NDArray[np.int64]:
    """The fold (0 … 9) of each of P = total pairs: in their order, the first P % 10 folds hold one pair more."""
    return np.repeat(np.arange(FOLDS), [total // FOLDS + (fold < total % FOLDS) for fold in range(FOLDS)])
