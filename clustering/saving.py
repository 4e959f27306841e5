"""How the tensors of a cluster service's state are cut over the ranks, so that any other number can take it up."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from clustering.published import OF_CLASSES
from clustering.service import ClusterService

Kind = Literal["class", "cluster", "sample", "rank", "whole"]


def kind_of(name: str) -> Kind:
    """What the rows of a tensor are of; its dotted name in `ClusterService.state_dict`.

    "sample": sorted by (class, sample), as the bank has them. "rank": one row a rank. "whole": the same on every rank.
    """
    first, _, last = name.partition(".")
    if first == "bank":
        return "sample"
    if first == "published":
        return "class" if last in OF_CLASSES else "cluster" if last == "c_SD" else "whole"
    if last == "run.centres_SD":
        return "cluster"
    return "rank" if last == "failure" else "sample"


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
