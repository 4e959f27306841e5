"""What a refresh publishes: centres, margins and everything the losses read until the next one, under one version.

All ranks make it together, at the same step, from the same run of k-means, and check that they agree on its number.
Between refreshes only the centres move, by the batch's samples (`Published.move`).

Legend: N rows of the global batch, D embedding size, P samples of this rank's classes, R its classes, C all
classes, K clusters, S clusters of this rank, k neighbours of a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.align import match_classes
from clustering.bank import EmbeddingBank
from clustering.contrastive import Candidates
from clustering.dist_kmeans import KMeansRun
from clustering.errors import ClusterStateError
from clustering.hardness import CountTable, agreement, cohesion, hard_level, weighted_mean
from clustering.kappaface import kappaface_margins
from clustering.margins import class_margins, smallest_margin
from clustering.neighbours import nearest_classes
from clustering.shards import show_rows, unit_or
from configs.schema import ClusteringConfig
from partial_fc.collectives import GatheredBatch, all_reduce_, extremes
from sharding import Shard

_TENSORS = (
    "c_SD", "anchor_RD", "code_I", "class_K", "owner_K", "weight_K", "f_R", "hard_R", "samples_R",
    "margin_R", "smallest", "neighbour_Ck",
)  # fmt: skip


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
    statistics: dict[str, float]
    """Scalars for the log, over all ranks."""

    def cluster_of(self, batch: GatheredBatch) -> tuple[Tensor, Tensor]:
        """Cluster of each row, int64 (N,), -1 for none or an unlabelled row; and whether it is suspect, bool (N,)."""
        ids_N = batch.sample_ids_N
        known_N = (batch.labels_N >= 0) & (ids_N >= 0) & (ids_N < len(self.code_I))
        code_N = torch.where(known_N, self.code_I[ids_N.clamp(0, len(self.code_I) - 1)].long(), 0)
        return code_N.abs() - 1, code_N < 0

    @torch.no_grad()
    def move(self, batch: GatheredBatch, momentum: float, shard: Shard, first_class: int) -> None:
        """c_k <- unit(momentum c_k + (1 - momentum) mean of the batch's rows of cluster k), suspects left out.

        An anchor is moved by the same arithmetic as the centre it copies, so that both stay equal. No collective,
        no host sync.
        """
        cluster_N, suspect_N = self.cluster_of(batch)
        cluster_N = torch.where(suspect_N, -1, cluster_N)
        sorted_N, order_N = cluster_N.sort(stable=True)
        starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
        starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
        segment_N = starts_N.cumsum(0) - 1
        x_ND = batch.x_ND.detach()
        mean_ND = torch.zeros_like(x_ND).index_add_(0, segment_N, x_ND[order_N])
        count_N = torch.zeros_like(x_ND[:, 0]).index_add_(0, segment_N, torch.ones_like(x_ND[:, 0]))
        mean_ND /= count_N.clamp_min(1)[:, None]
        # The cluster of each segment; segments beyond the last stay -1.
        cluster_N = torch.full_like(cluster_N, -1).scatter_(0, segment_N, sorted_N)
        class_N = torch.where(cluster_N >= 0, self.class_K[cluster_N.clamp_min(0)], -1)
        for rows_XD, place_N in ((self.c_SD, cluster_N - shard.start), (self.anchor_RD, class_N - first_class)):
            if not len(rows_XD):
                continue
            here_N = (place_N >= 0) & (place_N < len(rows_XD)) & (cluster_N >= 0)
            row_N = place_N.clamp(0, len(rows_XD) - 1)
            old_ND = rows_XD[row_N]
            new_ND = unit_or(momentum * old_ND + (1 - momentum) * mean_ND, old_ND)
            # Added, not stored: rows that lie elsewhere add zero to some row here, in any order.
            rows_XD.index_add_(0, row_N, torch.where(here_N[:, None], new_ND - old_ND, 0))

    def neighbours(self, batch: GatheredBatch) -> Tensor:
        """Nearest classes of each row's class, int64 (N x k,); -1 for none or an unlabelled row. No host sync."""
        neighbour_Nk = self.neighbour_Ck[batch.labels_N.clamp_min(0)].long()
        return torch.where(batch.labels_N[:, None] >= 0, neighbour_Nk, -1).flatten()

    def candidates(self, shard: Shard) -> Candidates:
        """This rank's columns of the contrastive loss: views, moving with the centres."""
        own = slice(shard.start, shard.stop)
        cluster_S = torch.arange(shard.start, shard.stop, device=self.c_SD.device)
        return Candidates.build(
            cluster_S=cluster_S, c_SD=self.c_SD, owner_S=self.owner_K[own], weight_S=self.weight_K[own]
        )

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in _TENSORS}
        return {**tensors, "version": self.version, "statistics": self.statistics}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Published:
        tensors = {name: state[name].to(device, copy=True) for name in _TENSORS}
        return cls(**tensors, version=state["version"], statistics=dict(state["statistics"]))


@torch.no_grad()
def publish(
    run: KMeansRun,
    bank: EmbeddingBank,
    previous: Published | None,
    *,
    config: ClusteringConfig,
    margin: float,
    num_classes: int,
    group: dist.ProcessGroup,
) -> Published:
    """Turn a finished run into the next version. Every rank calls it at the same step.

    Raises ClusterStateError, on all ranks, when ranks stand at different versions. Collectives: one broadcast a
    rank, one all-reduce of an int32 a sample, those of the matching, margins and neighbours, and some of one K each.
    """
    version = 1 if previous is None else previous.version + 1
    check_versions(version, group, bank.class_P.device)
    R, first = bank.shard.size, bank.shard.start
    cluster_P, counted_P = run.index_P, run.counted_P
    row_P = bank.class_P - first
    table = CountTable.count(bank.class_P, cluster_P, counted_P, bank.shard, num_classes, run.num_clusters)
    size_K = table.cluster_sizes(group)
    samples_R = table.samples()
    n_R = samples_R.double()

    f_R = agreement(table, size_K)
    rho_R, sums_RD = cohesion(run.points.x_PD, row_P, counted_P, R)
    hard_R = hard_level(f_R, rho_R, n_R, purity_weight=config.purity_weight, shrinkage=config.shrinkage, group=group)
    if previous is not None:
        hard_R = torch.lerp(hard_R, previous.hard_R, config.hard_level_momentum)
    if config.margin_rule == "kappaface":
        margin_R = kappaface_margins(rho_R, n_R, dim=sums_RD.shape[1], margin=margin, group=group)
    else:
        margin_R = class_margins(
            hard_R,
            n_R,
            margin=margin,
            low=config.margin_low,
            high=config.margin_high,
            delta=config.margin_delta,
            direction=config.direction,
            group=group,
        )
    class_K, owner_K = match_classes(table, group)
    code_P = torch.where(counted_P, cluster_P + 1, -cluster_P - 1).int()
    code_I = torch.zeros(bank.num_samples, dtype=torch.int32, device=code_P.device)
    code_I[bank.sample_P] = code_P
    moved = code_I.new_zeros(()) if previous is None else (code_P.abs() != previous.code_I[bank.sample_P].abs()).sum()
    all_reduce_(code_I, group)
    anchor_RD = _anchors(run, class_K, sums_RD, bank.shard, group)
    published = Published(
        version=version,
        c_SD=run.centres_SD.float(),
        anchor_RD=anchor_RD,
        code_I=code_I,
        class_K=class_K,
        owner_K=owner_K,
        weight_K=_weights(table, owner_K, group),
        f_R=f_R.float(),
        hard_R=hard_R,
        samples_R=samples_R,
        margin_R=margin_R,
        smallest=smallest_margin(margin_R, margin, group),
        neighbour_Ck=nearest_classes(anchor_RD, num_classes, config.hard_negatives, group),
        statistics={},
    )
    published.statistics = _summary(published, size_K, table, int(all_reduce_(moved.long(), group)), group)
    return published


def check_versions(version: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ClusterStateError on all ranks when they do not stand at the same version. One all-reduce."""
    oldest, newest = extremes(version, group, device)
    if oldest != newest:
        raise ClusterStateError(
            f"ranks hold cluster versions from {oldest} to {newest}: resume all from the same checkpoint"
        )


def _anchors(run: KMeansRun, class_K: Tensor, sums_RD: Tensor, shard: Shard, group: dist.ProcessGroup) -> Tensor:
    """Centre of each class's matched cluster, fetched from wherever it lies; else the class's own mean."""
    anchor_RD = unit_or(sums_RD, torch.zeros_like(sums_RD)).float()
    for rank, clusters in enumerate(run.shards):
        shown_SD = show_rows(run.centres_SD, clusters, rank, group)
        row_S = class_K[clusters.start : clusters.stop] - shard.start
        here_S = ((row_S >= 0) & (row_S < shard.size)).nonzero()[:, 0]
        anchor_RD[row_S[here_S]] = shown_SD[here_S].float()
    return anchor_RD


def _weights(table: CountTable, owner_K: Tensor, group: dist.ProcessGroup) -> Tensor:
    """w_k: the owner's samples in k over its samples in all clusters it owns; float32 (K,). One all-reduce."""
    owned_Q = owner_K[table.cluster_Q] == table.row_Q + table.shard.start
    count_Q = torch.where(owned_Q, table.count_Q, 0).double()
    share_Q = count_Q / table.by_row(count_Q)[table.row_Q].clamp_min(1)
    weight_K = torch.zeros(table.num_clusters, dtype=torch.float64, device=owner_K.device)
    return all_reduce_(weight_K.index_add_(0, table.cluster_Q, share_Q), group).float()


def _summary(
    published: Published, size_K: Tensor, table: CountTable, moved: int, group: dist.ProcessGroup
) -> dict[str, float]:
    """Scalars for the log. Six all-reduces of a few floats, one of K."""
    n_R = published.samples_R.double()
    _, largest_K = table.best_class(torch.ones_like(table.row_Q, dtype=torch.bool), group)
    total = max(1, int(size_K.sum()))
    seen = (published.code_I != 0).sum()
    numbers = {
        "seen": float(seen) / max(1, len(published.code_I)),
        "suspects": float((published.code_I < 0).sum()) / max(1, int(seen)),
        "moved": moved / max(1, int(seen)),
        "purity": float(largest_K.sum()) / total,
        "empty": float((size_K == 0).sum()) / max(1, len(size_K)),
        "agreement": float(weighted_mean(published.f_R.double(), n_R, group)),
    }
    for name, values_R in (("hard_level", published.hard_R), ("margin", published.margin_R)):
        mean = weighted_mean(values_R, n_R, group)
        deviation = weighted_mean((values_R - mean).square(), n_R, group).sqrt()
        numbers |= {f"{name}_mean": float(mean), f"{name}_deviation": float(deviation)}
    return numbers
