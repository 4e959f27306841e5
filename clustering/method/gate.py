"""The noise gate: samples that look mislabelled. Ours, see docs/method.md.

Legend: P samples of this rank's classes, R its classes (its rows), K clusters, D embedding size, Q samples at home, q
some suspects; of a table, Q its entries.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.method.hardness import CountTable
from clustering.nearest.float64_rows import row_dots
from clustering.service.shards import add_rows_

AT_HOME = 32
"""Samples of a class that say where its place is: so many that one more hardly moves it, and so few that classes of
thousands do not make a step of training long."""
_AT_ONCE = 4096


def find_suspects(table: CountTable, class_P: Tensor, cluster_P: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The noise gate: samples that look mislabelled, bool (P,). One all-reduce."""
    dominant_K, _ = table.best_class(torch.ones_like(table.row_Q, dtype=torch.bool), group)
    return suspects_of(table, dominant_K, class_P, cluster_P)


def suspects_of(table: CountTable, dominant_K: Tensor, class_P: Tensor, cluster_P: Tensor) -> Tensor:
    """The gate's rule, bool (P,), from the class that dominates each cluster (int64 (K,)). No collective.

    A sample is suspect when another class dominates its cluster while its own class dominates its own modal
    cluster: then the class has a place of its own, and the sample lies in another's. (It is then outside the
    modal cluster by itself.) A class whose samples are merely scattered dominates clusters and has no suspects.
    """
    modal_R = table.best_cluster(torch.ones_like(table.row_Q, dtype=torch.bool))
    class_R = torch.arange(table.shard.start, table.shard.stop, device=modal_R.device)
    settled_R = (modal_R >= 0) & (dominant_K[modal_R.clamp_min(0)] == class_R)
    elsewhere_P = (cluster_P >= 0) & (dominant_K[cluster_P.clamp_min(0)] != class_P)
    return elsewhere_P & settled_R[class_P - table.shard.start]


def clearly_elsewhere(
    suspect_P: Tensor,
    table: CountTable,
    x_PD: Tensor,
    class_P: Tensor,
    cluster_P: Tensor,
    best_P: Tensor,
    *,
    gap: float,
    sums_RD: Tensor,
) -> Tensor:
    """Those of the suspects whose cosine to their cluster's centre exceeds the one to their class's home by over `gap`.

    The home of a class is the mean direction of its samples in its modal cluster, the first AT_HOME of them: they lie
    with it on this rank. A sample between two look-alikes is about as near to both, a mislabelled one is not.

    Points ascend by class. x_PD: unit rows. best_P: float64, exact cosine of each point to its cluster's centre.
    sums_RD: int64 zeros to work in. bool (P,). No collective.
    """
    row_P = class_P - table.shard.start
    modal_R = table.best_cluster(torch.ones_like(table.row_Q, dtype=torch.bool))
    wanted_R = torch.zeros_like(modal_R, dtype=torch.bool)
    wanted_R[row_P[suspect_P]] = True
    home_Q = (wanted_R[row_P] & (cluster_P >= 0) & (cluster_P == modal_R[row_P])).nonzero()[:, 0]
    row_Q = row_P[home_Q]  # rising, as the points are
    place_Q = torch.arange(len(row_Q), device=row_Q.device) - torch.searchsorted(row_Q, row_Q)
    home_Q = home_Q[place_Q < AT_HOME]
    add_rows_(sums_RD, row_P[home_Q], x_PD, home_Q)
    clear_P = suspect_P.clone()
    for point_q in suspect_P.nonzero()[:, 0].split(_AT_ONCE):
        row_q = row_P[point_q]
        length_q = row_dots(sums_RD, row_q, sums_RD, row_q).sqrt().clamp_min(1)  # in fixed point: below 1 is nothing
        cosine_q = row_dots(x_PD, point_q, sums_RD, row_q) / length_q
        clear_P[point_q] = best_P[point_q] - cosine_q > gap
    return clear_P
