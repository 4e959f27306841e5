"""Which comparisons of points with centres can be left out, for certain, after the centres moved a little. Ours.

For every point a lower bound l of its angle to all centres but its own is kept. Centre k moves by the angle d_k, so by
the triangle inequality of the sphere the bound becomes l - d_k. A single centre that moves far would ruin it, as with
one bound for all (G. Hamerly, SDM 2010). Hence the centres are parted at a drift delta into lively (d_k > delta) and
quiet ones. A point whose own angle, computed anew, is below l - delta has no quiet centre nearer than its own: it is
compared with the lively ones alone, by a product of matrices over fewer columns. The others are compared with all.
Delta is where the predicted number of comparisons is least.

All roundings are taken to the safe side: the result is that of comparing everything.

Legend: P points, K clusters, T thresholds.
"""

from __future__ import annotations

import torch
from torch import Tensor

_THRESHOLDS = 64
_ANGLE_SLACK = 1e-5
"""Radians: rounding of arcus functions in float32, and of centres that are unit to 1e-7."""


FAR = 5.0
"""Drift of a centre that comes into being or is not known before: more than any bound, so never quiet."""


def drift_angles(old_SD: Tensor, new_SD: Tensor) -> Tensor:
    """Angle by which each centre moved, rounded up, float32 (S,); exactly 0 where it did not.

    2 asin(|new - old| / 2), as the arcus cosine of nearly 1 has half the digits. FAR for a centre that was or is zero.
    """
    angle_S = 2 * torch.asin((((new_SD - old_SD).norm(dim=1)) / 2).clamp_max(1)) * (1 + 1e-5) + _ANGLE_SLACK
    still_S = (old_SD == new_SD).all(1)
    born_S = (old_SD == 0).all(1) | (new_SD == 0).all(1)
    drift_S: Tensor = angle_S.masked_fill(born_S, FAR).masked_fill(still_S, 0.0)
    return drift_S


def angles_at_least(cosine_P: Tensor, slack: float) -> Tensor:
    """Lower bound of the angles whose cosines are known up to `slack`, float32; pi + 1 for a cosine of -inf (none)."""
    angle_P: Tensor = torch.acos((cosine_P.float() + slack).clamp(-1, 1)) - _ANGLE_SLACK
    return angle_P.masked_fill_(cosine_P == float("-inf"), torch.pi + 1)


def angles_at_most(cosine_P: Tensor, slack: float) -> Tensor:
    """Upper bound of the angles whose cosines are known up to `slack`, float32."""
    angle_P: Tensor = torch.acos((cosine_P.float() - slack).clamp(-1, 1)) + _ANGLE_SLACK
    return angle_P


def thresholds(drift_K: Tensor) -> Tensor:
    """Values of delta worth a try: quantiles of the drifts, 0 first and the largest last, rising, float32 (T,)."""
    sorted_K = drift_K.sort().values
    place_T = torch.linspace(0, len(drift_K) - 1, _THRESHOLDS, device=drift_K.device).round().long()
    delta_T: Tensor = torch.cat([sorted_K.new_zeros(1), sorted_K[place_T]]).unique()
    return delta_T


def passing_counts(gap_P: Tensor, delta_T: Tensor) -> Tensor:
    """How many of this rank's points pass at each threshold, gap > delta: int64 (T,).

    gap_P: the bound of the angle to the other centres before they moved, minus the own angle.
    """
    least_P = torch.searchsorted(delta_T, gap_P, side="left")  # thresholds below the gap
    count_T: Tensor = torch.bincount(least_P, minlength=len(delta_T) + 1)
    return count_T.flip(0).cumsum(0).flip(0)[1:]


def best_threshold(delta_T: Tensor, passing_T: Tensor, drift_K: Tensor, points: int) -> float:
    """The delta of fewest comparisons. passing_T: over all ranks, as is `points`; the first of equals."""
    sorted_K = drift_K.sort().values
    K = len(drift_K)
    lively_T = K - torch.searchsorted(sorted_K, delta_T, side="right")
    cost_T = passing_T.double() * lively_T + (points - passing_T).double() * K
    return float(delta_T[cost_T.argmin()])
