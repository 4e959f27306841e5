"""How the tensors of a cluster service's state are cut over the ranks, so that any other number can take it up."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from clustering.service.dist_kmeans import OF_POINTS
from clustering.service.published import OF_CLASSES, TENSORS
from clustering.service.service import ClusterService

Kind = Literal["class", "cluster", "sample", "rank", "whole"]


_KINDS: dict[str, Kind] = {
    "bank.x": "sample",
    "bank.seen": "sample",
    **{f"published.{name}": "whole" for name in TENSORS},
    **{f"published.{name}": "class" for name in OF_CLASSES},
    "published.c_SD": "cluster",
    "refresh.x": "sample",
    "refresh.failure": "rank",
    "refresh.run.centres_SD": "cluster",
    **{f"refresh.run.{name}": "sample" for name in (*OF_POINTS, "seed_P")},
}


def kind_of(name: str) -> Kind:
    """What the rows of a tensor are of; its dotted name in `ClusterService.state_dict`. KeyError for another.

    "sample": sorted by (class, sample), as the bank has them. "rank": one row a rank. "whole": the same on every rank.
    """
    return _KINDS[name]


def first_and_total(service: ClusterService, kind: Kind) -> tuple[int, int]:
    """First row of this rank, and the rows of all ranks."""
    rank, world_size = dist.get_rank(service.group), dist.get_world_size(service.group)
    return {
        "class": (service.classes.start, service.num_classes),
        "cluster": (service.clusters.start, service.num_clusters),
        "sample": (service.bank.first, service.bank.num_samples),
        "rank": (rank, world_size),
        "whole": (0, 0),
    }[kind]
