"""Spherical k-means in one process, written to be read: the specification that `dist_kmeans` must equal.

Centres maximise the cosine to their members and are the members' mean scaled to unit length. A centre that is a
zero row does not exist yet: nothing is assigned to it, and it is seeded like an empty cluster. One iteration:

1. assign: every point goes to the centre of largest cosine, ties to the smaller index;
2. gate: points that look mislabelled are found (`clustering.method.gate`); they no longer count in this iteration;
3. seed: the worst-fitted counted point of each class is a candidate, the worst first (ties to the smaller class);
   the j-th empty cluster takes the j-th candidate as an additional member. One candidate a class, so that seeds
   do not gather on the few noisiest classes, and none for a class whose points all sit on their centres. Fewer
   candidates than empty clusters leave the rest for the next time. Cosines are compared on a coarse grid
   (`fit_level`): both samples of a pair fit its mean equally, and rounding must not choose between them;
4. mean: every centre becomes the unit mean of its counted members; without any it stays.

The first refresh starts from the class means, cluster k = class k, and from zero rows for the extra clusters: the
first assignment then shows which samples no class mean fits.

Legend: N points, D embedding size, K clusters, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gate = Callable[[Tensor], Tensor]
"""Cluster of each point (int64, -1: none) to a mask of the points that count (bool)."""


FIT_LEVELS = 1 << 16
"""Levels of cosine 0 … 1 that seeding tells apart: far above float32's rounding, far below a visible difference."""
WELL_FITTED = round(0.999 * FIT_LEVELS)
"""From here on a point needs no seed: bf16 rounding alone takes an embedding this far from its own centre."""


def fit_level(best_N: Tensor) -> Tensor:
    """Cosines as int64 levels; equal levels are ties."""
    return (best_N.clamp(-1, 1) * FIT_LEVELS).round().long()


@dataclass(frozen=True, kw_only=True, slots=True)
class KMeansResult:
    """Where k-means ended."""

    centres_KD: Tensor
    index_N: Tensor
    """int64: each point's cluster in the last assignment, -1 when no centre existed."""
    counted_N: Tensor
    """bool: the points that count after the last gate."""


def assign(x_ND: Tensor, centres_KD: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) and its cluster (N,) int64; -inf and -1 where no centre exists. (N, K) is never kept."""
    missing_K = (centres_KD == 0).all(1)
    best, index = [], []
    for part_nD in x_ND.split(chunk):
        cos_nK = (part_nD @ centres_KD.T).masked_fill(missing_K, float("-inf"))
        best_n, index_n = cos_nK.max(1)  # of equal cosines torch gives the first
        best.append(best_n)
        index.append(torch.where(best_n > float("-inf"), index_n, -1))
    return torch.cat(best), torch.cat(index)


def seeds(best_N: Tensor, index_N: Tensor, classes_N: Tensor, counted_N: Tensor, K: int) -> list[tuple[int, int]]:
    """(point, empty cluster) pairs: step 3 of an iteration."""
    members = {int(k) for k, counts in zip(index_N, counted_N, strict=True) if counts}
    worst: dict[int, tuple[int, int]] = {}
    levels = fit_level(best_N).tolist()
    for point, (y, fit, counts) in enumerate(zip(classes_N.tolist(), levels, counted_N.tolist(), strict=True)):
        if counts and fit < WELL_FITTED and (y not in worst or fit < worst[y][0]):
            worst[y] = (fit, point)
    candidates = [point for _, _, point in sorted((fit, y, point) for y, (fit, point) in worst.items())]
    empty = [k for k in range(K) if k not in members]
    return list(zip(candidates, empty, strict=False))


def unit_means(x_ND: Tensor, index_N: Tensor, counted_N: Tensor, otherwise_KD: Tensor) -> Tensor:
    """Unit mean of the counted points of each cluster; a cluster without any keeps its row of `otherwise_KD`."""
    sums_KD = torch.zeros_like(otherwise_KD)
    sums_KD.index_add_(0, index_N[counted_N], x_ND[counted_N])
    length_K1 = sums_KD.norm(dim=1, keepdim=True)
    return torch.where(length_K1 > 0, sums_KD / length_K1, otherwise_KD)


def class_mean_centres(x_ND: Tensor, classes_N: Tensor, num_classes: int, K: int) -> Tensor:
    """Where the first refresh starts: class means, then zero rows; a class without points has a zero row too."""
    everything_N = torch.ones_like(classes_N, dtype=torch.bool)
    zeros_KD = x_ND.new_zeros(max(K, num_classes), x_ND.shape[1])
    return unit_means(x_ND, classes_N, everything_N, zeros_KD)[:K]


def spherical_kmeans(
    x_ND: Tensor, classes_N: Tensor, centres_KD: Tensor, *, iterations: int, gate: Gate | None = None
) -> KMeansResult:
    """`iterations` times assign, gate, seed, mean.

    x_ND: float32 or float64 unit rows. classes_N: int64, read by seeding alone. centres_KD: unit or zero rows.
    """
    for _ in range(iterations):
        best_N, index_N = assign(x_ND, centres_KD)
        counted_N = index_N >= 0 if gate is None else gate(index_N)
        planted = seeds(best_N, index_N, classes_N, counted_N, len(centres_KD))
        points = torch.tensor([point for point, _ in planted], dtype=torch.int64)
        clusters = torch.tensor([cluster for _, cluster in planted], dtype=torch.int64)
        centres_KD = unit_means(
            torch.cat([x_ND, x_ND[points]]),
            torch.cat([index_N, clusters]),
            torch.cat([counted_N, counted_N[points]]),
            centres_KD,
        )
    return KMeansResult(centres_KD=centres_KD, index_N=index_N, counted_N=counted_N)
