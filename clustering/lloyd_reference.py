"""One iteration of spherical k-means without labels, in float64 and one process, written to be read: `clustering.lloyd`
must equal it.

As `clustering.kmeans`, each cluster seeding as a class does there, and zero rows belonging to no cluster.

Legend: N points, D embedding size, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.kmeans import assign, seeds, unit_means


def plain_iteration(x_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres after one iteration (K, D); before them, each point's largest cosine (N,) and its cluster (N,), -1: none.

    x_ND, centres_KD: float64, unit or zero rows.
    """
    best_N, index_N = assign(x_ND, centres_KD)
    index_N = torch.where((x_ND != 0).any(1), index_N, -1)
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
