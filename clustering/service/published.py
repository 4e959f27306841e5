"""What a refresh publishes: centres, margins and everything the losses read until the next one, under one version.

All ranks make it together from the same run of k-means (`clustering.service.publication`) and take it up at the same
step. Between refreshes only the centres move, by the batch's samples (`Published.move`).

Legend: N rows of the global batch, D embedding size, R classes of this rank, C all classes, K clusters, S clusters of
this rank, k neighbours of a class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clustering.service.pulled import Pulled
from clustering.step.choice import step_ops
from clustering.step.plain import Moving
from partial_fc.collectives import GatheredBatch
from sharding import Shard

TENSORS = (
    "c_SD", "anchor_RD", "code_I", "class_K", "owner_K", "weight_K", "f_R", "hard_R", "samples_R",
    "margin_R", "smallest", "neighbour_Ck",
)  # fmt: skip

_NUMBERS = ("version", "drops_suspects", "own_centres")

OF_CLASSES = ("anchor_RD", "f_R", "hard_R", "samples_R", "margin_R")
"""Of the tensors, those cut by class; c_SD is cut by cluster, the others are the same on every rank."""


@dataclass(kw_only=True, slots=True)
class Published:
    """One version of the clusters, as one rank holds it."""

    version: int
    c_SD: Tensor
    """float32 unit centres of this rank's clusters (a zero row: a cluster that never had a sample)."""
    anchor_RD: Tensor
    """float32 a_y: the centre of the cluster matched to class y, wherever it lies; without one, y's own mean."""
    code_I: Tensor
    """int32 (num_samples,), on every rank: cluster + 1; below 0 the same of a suspect; 0: not seen yet."""
    class_K: Tensor
    """int64, on every rank: the class matched to the cluster, -1 for none."""
    owner_K: Tensor
    """int64, on every rank: the class that owns the cluster, -1 for an empty one."""
    weight_K: Tensor
    """float32, on every rank: w_k of the contrastive loss, T of the owner over its clusters."""
    f_R: Tensor
    """float32 F_y, agreement of class and clusters."""
    hard_R: Tensor
    """float64 h_y, averaged over refreshes."""
    samples_R: Tensor
    """int64 N_y: samples with a cluster, suspects left out."""
    margin_R: Tensor
    """float64 margins at full strength."""
    smallest: Tensor
    """float64 scalar, on every rank: the smallest of all classes' margins, which suspects get."""
    neighbour_Ck: Tensor
    """int32, on every rank: the classes nearest to each class when this was published, -1 for none; k may be 0."""
    drops_suspects: bool
    """Whether suspects leave the margin softmax."""
    own_centres: bool
    """Whether centres are of their owners' samples alone."""
    statistics: dict[str, float]
    """Scalars for the log, over all ranks."""
    _last: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = field(default=None, init=False, repr=False)
    """Ids, labels and what `cluster_of` said of them: a step asks several times."""
    _pulled: Pulled | None = field(default=None, init=False, repr=False)

    def cluster_of(self, batch: GatheredBatch) -> tuple[Tensor, Tensor]:
        """Cluster of each row, int64 (N,), -1 for none or an unlabelled row; and whether it is suspect, bool (N,)."""
        ids_N = batch.sample_ids_N
        if self._last is not None and self._last[0] is ids_N and self._last[1] is batch.labels_N:
            return self._last[2]
        found = step_ops(self.c_SD).codes(self.code_I, ids_N, batch.labels_N)
        self._last = (ids_N, batch.labels_N, found)
        return found

    def row_margins(
        self, batch: GatheredBatch, otherwise_N: Tensor, margin_R: Tensor, smallest: Tensor, first_class: int
    ) -> Tensor:
        """Of each row its class's margin, or `smallest` for a suspect; `otherwise_N` where the class is not here."""
        row_N = batch.labels_N - first_class
        here_N = (row_N >= 0) & (row_N < len(margin_R))
        margin_N = torch.where(here_N, margin_R[row_N.clamp(0, len(margin_R) - 1)], otherwise_N)
        _, suspect_N = self.cluster_of(batch)
        return torch.where(suspect_N & here_N, smallest, margin_N)

    def pulled(self, shard: Shard, first_class: int) -> Pulled:
        """What this rank pulls features to; made when it is first asked for, which the host waits for."""
        if self._pulled is None:
            self._pulled = Pulled.of(
                c_SD=self.c_SD,
                anchor_RD=self.anchor_RD,
                class_K=self.class_K,
                owner_K=self.owner_K,
                weight_K=self.weight_K,
                shard=shard,
                first_class=first_class,
                means=self.own_centres,
            )
            self.c_SD = self._pulled.rows_XD[: shard.size]
        return self._pulled

    @torch.no_grad()
    def move(self, batch: GatheredBatch, momentum: float, shard: Shard, first_class: int) -> None:
        """c_k <- unit(momentum c_k + (1 - momentum) mean of the batch's rows of cluster k), suspects left out.

        Rows that are not finite are left out too; with `own_centres` those of classes that do not own the cluster, and
        a class that owns none moves its mean likewise. An anchor is moved by the same arithmetic as the centre or mean
        that it copies, so that both stay equal. No collective, no host sync but for the version's first.
        """
        pulled = self.pulled(shard, first_class)
        cluster_N, suspect_N = self.cluster_of(batch)
        if self.own_centres:
            cluster_N = pulled.numbers(cluster_N, batch.labels_N, self.owner_K, first_class)
        moving = Moving(
            c_SD=pulled.rows_XD,
            first_cluster=shard.start,
            anchor_RD=self.anchor_RD,
            first_class=first_class,
            class_K=pulled.class_X,
        )
        step_ops(self.c_SD).move(moving, batch.x_ND.detach(), cluster_N, suspect_N, momentum)
        self._last = None  # the batch's tensors may be filled anew

    def neighbours(self, batch: GatheredBatch) -> Tensor:
        """Nearest classes of each row's class, int64 (N x k,); -1 for none or an unlabelled row. No host sync."""
        neighbour_Nk = self.neighbour_Ck[batch.labels_N.clamp_min(0)].long()
        return torch.where(batch.labels_N[:, None] >= 0, neighbour_Nk, -1).flatten()

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in TENSORS}
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, "statistics")}
        return {**tensors, **numbers}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Published:
        tensors = {name: state[name].to(device, copy=True) for name in TENSORS}
        numbers = {name: state[name] for name in _NUMBERS}
        return cls(**tensors, **numbers, statistics=dict(state["statistics"]))
