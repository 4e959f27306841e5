"""One iteration of spherical k-means without labels, in float64 and one process, written to be read:
`clustering.lloyd.lloyd` must equal it.

As `clustering.kmeans`, each cluster seeding as a class does there, and zero rows belonging to no cluster.

Legend: N points, D embedding size, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.kmeans import seeds, unit_means


def assign(x_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) and its cluster (N,) int64; -inf and -1 for a zero row, or where no centre exists.

    Sums row by row: a product of matrices may round equal columns unequally, and then miss the smaller index.
    """
    cosine_NK = torch.stack([(x_ND * centre_D).sum(1) for centre_D in centres_KD], dim=1)
    none_NK = (x_ND == 0).all(1)[:, None] | (centres_KD == 0).all(1)
    best_N, index_N = cosine_NK.masked_fill(none_NK, float("-inf")).max(1)
    return best_N, torch.where(best_N > float("-inf"), index_N, -1)


def plain_iteration(x_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres after one iteration (K, D); before them, each point's largest cosine (N,) and its cluster (N,), -1: none.

    x_ND, centres_KD: float64, unit or zero rows.
    """
    best_N, index_N = assign(x_ND, centres_KD)
    counted_N = index_N >= 0
    planted = seeds(best_N, index_N, index_N, counted_N, len(centres_KD))
    point_J, cluster_J = torch.tensor(planted, dtype=torch.int64).reshape(-1, 2).unbind(1)
    new_KD = unit_means(
        torch.cat([x_ND, x_ND[point_J]]),
        torch.cat([index_N, cluster_J]),
        torch.cat([counted_N, counted_N[point_J]]),
        centres_KD,
    )
    return new_KD, best_N, index_N
