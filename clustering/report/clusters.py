"""The method's k-means over a whole labelled set, until it settles, and what it says about the labels.

Legend: P samples with an embedding, sorted by (label, sample), C labels, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.method.gate import find_suspects
from clustering.method.hardness import CountTable, agreement, cohesion, hard_level
from clustering.report.data import Bools, Doubles, Ints, Labelled
from clustering.service.bank import Points
from clustering.service.dist_kmeans import KMeansRun
from configs.schema import ClusteringConfig
from sharding import Shard

MOST_ITERATIONS = 20
SETTLED = 0.001
"""Share of the samples that may still change their cluster when k-means counts as settled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Where k-means settled. Rows of labels without samples are zero."""

    index_P: Ints
    suspect_P: Bools
    """What the noise gate of docs/method.md without `noise_gap` holds for mislabelled."""
    hard_C: Doubles
    """Hard level; 0: compact and by itself, 1: scattered or mixed with others."""
    agreement_C: Doubles
    """F: BCubed precision and pairwise recall."""
    cohesion_C: Doubles
    """rho: mean cosine over pairs, suspects left out."""
    iterations: int


def cluster(
    data: Labelled, group: dist.ProcessGroup, *, progress: Callable[[int, float], None] = lambda number, moved: None
) -> Clusters:
    """From class means and C + E clusters, E the default share of docs/method.md, gate on; deterministic.

    group: of one rank. progress: called with the iteration and the share of samples that changed their cluster.
    N K D multiplications an iteration, MOST_ITERATIONS at most.
    """
    config = ClusteringConfig()
    C = data.num_labels
    K = config.num_clusters(C)
    whole = Shard(0, C)
    points = Points(
        x_PD=torch.from_numpy(data.x_PD),
        class_P=torch.from_numpy(data.label_P),
        sample_P=torch.from_numpy(data.sample_P),
        seen_P=torch.ones(len(data.x_PD), dtype=torch.bool),
        largest=len(data.x_PD),
    )

    def suspects(index_P: Tensor) -> Tensor:
        table = CountTable.count(points.class_P, index_P, index_P >= 0, whole, C, K)
        return find_suspects(table, points.class_P, index_P, group)

    centres_KD: Tensor | None = None
    before_P = points.class_P
    for number in range(1, MOST_ITERATIONS + 1):
        run = KMeansRun(
            points=points,
            centres_SD=centres_KD,
            num_clusters=K,
            iterations=1,
            block=config.block,
            gate=lambda index_P: (index_P >= 0) & ~suspects(index_P),
            group=group,
        )
        while run.advance():
            pass
        moved = float((run.index_P != before_P).double().mean())
        progress(number, moved)
        centres_KD, before_P = run.centres_SD, run.index_P
        if moved <= SETTLED:
            break
    suspect_P = suspects(run.index_P)
    table = CountTable.count(points.class_P, run.index_P, ~suspect_P, whole, C, K)
    f_C = agreement(table, table.cluster_sizes(group))
    rho_C, _ = cohesion(points.x_PD, points.class_P, ~suspect_P, C)
    n_C = table.samples()
    hard_C = hard_level(f_C, rho_C, n_C, purity_weight=config.purity_weight, shrinkage=config.shrinkage)
    return Clusters(
        index_P=run.index_P.numpy(),
        suspect_P=suspect_P.numpy(),
        hard_C=np.where(n_C.numpy() > 0, hard_C.numpy(), 0.0),
        agreement_C=f_C.numpy(),
        cohesion_C=rho_C.numpy(),
        iterations=number,
    )
