"""The exact ROC of similarity scores, ties included: TAR at a FAR, area, equal error rate.

A pair is accepted when its score is at least the threshold. FAR: share of the impostor pairs (two persons) accepted;
TAR: share of the genuine pairs (one person) accepted. A threshold cannot part equal scores, so the ROC has one point
for each distinct score. Legend: P pairs, T points of the ROC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_ROUNDING = 1e-12
"""1e-3 of 3000 pairs must be 3, whichever way the product rounds."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Roc:
    """Every (FAR, TAR) that a threshold can reach, from nothing accepted to everything."""

    far_T: Floats
    """Non-decreasing, 0 … 1."""
    tar_T: Floats
    """Non-decreasing, 0 … 1."""
    threshold_T: Floats
    """Accept scores of at least this; decreasing, the first is infinite."""
    genuine: int
    """Pairs of one person."""
    impostors: int
    """Pairs of two persons."""

    @property
    def auc(self) -> float:
        """Area under the ROC: the chance that a genuine pair outscores an impostor pair, ties counted half."""
        return float(np.trapezoid(self.tar_T, self.far_T))

    @property
    def eer(self) -> float:
        """Equal error rate: FAR = 1 - TAR, where the straight lines between the ROC's points cross that diagonal.

        A line between two points is what accepting some of the equal scores by lot gives, so nothing is made up.
        """
        excess_T = self.far_T - (1 - self.tar_T)  # from -1 to 1, never falling
        after = int(np.argmax(excess_T >= 0))
        share = -excess_T[after - 1] / (excess_T[after] - excess_T[after - 1])
        return float(self.far_T[after - 1] + share * (self.far_T[after] - self.far_T[after - 1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class TarAtFar:
    """The best TAR among thresholds whose FAR is at most `far`."""

    far: float
    """What was asked for."""
    tar: float
    """nan where `reason` is given."""
    threshold: float
    """Similarity score from which pairs are accepted; infinite when even the best score would be too many."""
    reason: str
    """Why there is no figure; empty when there is one."""


def roc_of(scores_P: Floats, same_P: Bools) -> Roc:
    """ROC of scores (higher: more alike) and whether each pair shows one person. O(P log P).

    Raises ValueError for scores that are not finite, other shapes, truths that are not bool, or pairs of one kind only.
    """
    check_pairs(scores_P, same_P)
    genuine = int(np.count_nonzero(same_P))
    impostors = len(same_P) - genuine
    if not genuine or not impostors:
        raise ValueError(f"expected pairs of one person and of two, got {genuine} and {impostors}")
    order = np.argsort(-scores_P, kind="stable")
    sorted_P = scores_P[order]
    accepted_P = np.cumsum(same_P[order])
    last = np.flatnonzero(np.append(sorted_P[1:] != sorted_P[:-1], True))  # of each run of equal scores
    tar_T = np.append(0, accepted_P[last]) / genuine
    far_T = np.append(0, last + 1 - accepted_P[last]) / impostors
    threshold_T = np.append(np.inf, sorted_P[last])
    return Roc(far_T=far_T, tar_T=tar_T, threshold_T=threshold_T, genuine=genuine, impostors=impostors)


def check_pairs(values_P: Floats, same_P: Bools) -> None:
    """Raise ValueError unless there is one finite value and one boolean for each pair.

    A truth of 0 and 1 in another type would index where a mask is meant, and give a wrong figure without an error.
    """
    if values_P.ndim != 1 or values_P.shape != same_P.shape:
        raise ValueError(f"expected one value and one truth a pair, got shapes {values_P.shape} and {same_P.shape}")
    if same_P.dtype != np.bool_:
        raise ValueError(f"expected bool for whether a pair shows one person, got {same_P.dtype}: use astype(bool)")
    if not np.isfinite(values_P).all():
        raise ValueError(f"expected finite values, got {np.count_nonzero(~np.isfinite(values_P))} that are not")


def tar_at_far(roc: Roc, far: float) -> TarAtFar:
    """TAR at a FAR of at most `far`, without interpolation.

    A `far` below 1 / impostors asks for less than one false acceptance, which this many pairs cannot measure: nan,
    with the reason. Raises ValueError unless 0 < far <= 1.
    """
    if not 0 < far <= 1:
        raise ValueError(f"expected 0 < FAR <= 1, got {far}")
    allowed = math.floor(far * roc.impostors * (1 + _ROUNDING))
    if allowed == 0:
        needed = math.ceil((1 - _ROUNDING) / far)
        reason = f"FAR {far:g} needs at least {needed} pairs of two persons, there are {roc.impostors}"
        return TarAtFar(far=far, tar=math.nan, threshold=math.nan, reason=reason)
    accepted_T = np.rint(roc.far_T * roc.impostors)
    at = int(np.searchsorted(accepted_T, allowed, side="right")) - 1
    return TarAtFar(far=far, tar=float(roc.tar_T[at]), threshold=float(roc.threshold_T[at]), reason="")


def nearest_tars(roc: Roc, fars: Sequence[float]) -> tuple[float, ...]:
    """For each rate, TAR at the point whose FAR is nearest to it, below or above, as insightface reports for IJB.

    Where two are as near, the one of the higher FAR, and of one FAR the highest TAR. As scikit-learn's `roc_curve` does
    by itself, points on a straight line between their neighbours are left out first: of points on one level the ends
    only are looked at, which may be far from the rate. Kept for comparison with published figures; `tar_at_far` is
    exact.
    """
    accepted = np.rint(roc.far_T[1:] * roc.impostors), np.rint(roc.tar_T[1:] * roc.genuine)
    bends = (np.diff(accepted[0], 2) != 0) | (np.diff(accepted[1], 2) != 0)
    # The infinite threshold is put before the others after the points were chosen.
    kept = np.append(0, 1 + np.flatnonzero(np.append(np.append(True, bends), len(accepted[0]) > 1)))
    falling_far, falling_tar = roc.far_T[kept][::-1], roc.tar_T[kept][::-1]
    return tuple(float(falling_tar[np.argmin(np.abs(falling_far - far))]) for far in fars)
