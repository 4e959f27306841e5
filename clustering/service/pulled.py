"""What one rank pulls features to: the centres of its clusters, and with `own_centres` one row for each of its classes
that own no cluster, their mean.

These rows lie behind the centres in one tensor, so that a step compares, and moves, them together. Where clusters have
numbers, the rows have those behind this rank's clusters, and the clusters of the ranks behind it come after them.

Legend: N rows of the global batch, D embedding size, R classes of this rank, K clusters, S clusters of this rank, L
classes of this rank without a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clustering.step.plain import Columns
from sharding import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """Made when a version is taken up."""

    rows_XD: Tensor
    """float32 (S + L, D), unit rows: the centres, then the means."""
    columns: Columns
    """Of the contrastive loss: views of the rows."""
    class_X: Tensor
    """int64 (K + L,): the class whose anchor a row with this number is, -1 for none."""
    number_R: Tensor
    """int64 (R,): of each class the number of its mean, -1 where it owns a cluster."""
    stop: int
    """Number of the first cluster behind this rank's."""

    @classmethod
    def of(
        cls,
        *,
        c_SD: Tensor,
        anchor_RD: Tensor,
        class_K: Tensor,
        owner_K: Tensor,
        weight_K: Tensor,
        shard: Shard,
        first_class: int,
        means: bool,
    ) -> Pulled:
        """Of a version's tensors (`clustering.service.published`). means: whether classes without a cluster have a row.
        c_SD is copied if any has. No collective; the host waits.
        """
        lone_R = (anchor_RD != 0).any(1) if means else torch.zeros_like(anchor_RD[:, 0], dtype=torch.bool)
        owner_R = owner_K[(owner_K >= first_class) & (owner_K < first_class + len(anchor_RD))] - first_class
        lone_R[owner_R] = False
        lone_L = lone_R.nonzero()[:, 0]
        rows_XD = torch.cat([c_SD, anchor_RD[lone_L]]) if len(lone_L) else c_SD
        class_L, own = first_class + lone_L, slice(shard.start, shard.stop)
        number_L = shard.stop + torch.arange(len(lone_L), device=c_SD.device)
        columns = Columns.build(
            cluster_S=torch.arange(shard.start, shard.stop + len(lone_L), device=c_SD.device),
            c_SD=rows_XD,
            owner_S=torch.cat([owner_K[own], class_L]),
            weight_S=torch.cat([weight_K[own], torch.ones_like(number_L, dtype=weight_K.dtype)]),
        )
        return cls(
            rows_XD=rows_XD,
            columns=columns,
            class_X=torch.cat([class_K[: shard.stop], class_L, class_K[shard.stop :]]),
            number_R=torch.full_like(lone_R, -1, dtype=torch.int64).index_copy_(0, lone_L, number_L),
            stop=shard.stop,
        )

    def numbers(self, cluster_N: Tensor, labels_N: Tensor, owner_K: Tensor, first_class: int) -> Tensor:
        """Of each row of the batch the number of what it moves, int64 (N,): the cluster it lies in, if its class owns
        it; the class's mean, if the class owns none and is this rank's; -1: nothing. No host sync.
        """
        behind = len(self.class_X) - len(owner_K)
        owned_N = owner_K[cluster_N.clamp_min(0)] == labels_N
        number_N = torch.where(cluster_N >= self.stop, cluster_N + behind, cluster_N)
        if not behind:
            return torch.where(owned_N, number_N, -1)
        row_N = labels_N - first_class
        here_N = (row_N >= 0) & (row_N < len(self.number_R)) & (cluster_N >= 0)
        mean_N = torch.where(here_N, self.number_R[row_N.clamp(0, len(self.number_R) - 1)], -1)
        return torch.where(owned_N, number_N, mean_N)
