"""The hard level of each class: how far k-means, which sees no labels, disagrees with them. Ours, see docs/method.md.

Everything is counted from T, the number of samples of class y in cluster k, as sparse triplets on the owner of y.
Functions with a `group` run collectives and say how many. Means over classes are taken where the numbers of all classes
lie, so that they are the same bits on any number of ranks.

Legend: P samples of this rank's classes, R its classes (its rows), C all classes, K clusters, Q non-zero entries of T,
D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.service.shards import add_rows_
from partial_fc.collectives import all_reduce_
from sharding import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class CountTable:
    """This rank's rows of T, its non-zero entries sorted by (class, cluster)."""

    row_Q: Tensor
    """int64, class minus the shard's first."""
    cluster_Q: Tensor
    count_Q: Tensor
    """int64, at least 1."""
    shard: Shard
    num_classes: int
    num_clusters: int

    @classmethod
    def count(
        cls, class_P: Tensor, cluster_P: Tensor, counted_P: Tensor, shard: Shard, num_classes: int, num_clusters: int
    ) -> CountTable:
        """T over the samples of `counted_P` that have a cluster. Class and cluster int64, counted bool; all (P,)."""
        taken_P = counted_P & (cluster_P >= 0)
        key = (class_P[taken_P] - shard.start) * num_clusters + cluster_P[taken_P]
        pair_Q, count_Q = key.unique(return_counts=True)
        return cls(
            row_Q=pair_Q // num_clusters,
            cluster_Q=pair_Q % num_clusters,
            count_Q=count_Q,
            shard=shard,
            num_classes=num_classes,
            num_clusters=num_clusters,
        )

    @classmethod
    def empty(cls, shard: Shard, num_classes: int, num_clusters: int, device: torch.device) -> CountTable:
        """Of no sample."""
        none_Q = torch.empty(0, dtype=torch.int64, device=device)
        return cls(
            row_Q=none_Q,
            cluster_Q=none_Q,
            count_Q=none_Q,
            shard=shard,
            num_classes=num_classes,
            num_clusters=num_clusters,
        )

    def by_row(self, values_Q: Tensor) -> Tensor:
        """Sum of the values over each class: (R,)."""
        return values_Q.new_zeros(self.shard.size).index_add_(0, self.row_Q, values_Q)

    def samples(self) -> Tensor:
        """N_y, int64 (R,)."""
        return self.by_row(self.count_Q)

    def cluster_sizes(self, group: dist.ProcessGroup) -> Tensor:
        """M_k, int64 (K,), over all ranks. One all-reduce."""
        sizes_K = self.count_Q.new_zeros(self.num_clusters).index_add_(0, self.cluster_Q, self.count_Q)
        return all_reduce_(sizes_K, group)

    def best_class(self, entries_Q: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """For each cluster the class of largest count (ties: the smaller class) and that count, over all ranks.

        entries_Q: bool, the entries that compete. Returns int64 (K,) twice; -1 and 0 where none does. One
        all-reduce (MAX) of count x C + (C - 1 - class), which orders by count, then by class downwards.
        """
        key_K = all_reduce_(self.class_keys(entries_Q), group, dist.ReduceOp.MAX)
        return self.class_of(key_K)

    def class_keys(self, entries_Q: Tensor) -> Tensor:
        """What `best_class` takes the largest of, int64 (K,), of this rank's classes; -1 where none competes."""
        class_Q = self.row_Q + self.shard.start
        key_Q = torch.where(entries_Q, self.count_Q * self.num_classes + (self.num_classes - 1 - class_Q), -1)
        return key_Q.new_full((self.num_clusters,), -1).scatter_reduce_(0, self.cluster_Q, key_Q, "amax")

    def class_of(self, key_K: Tensor) -> tuple[Tensor, Tensor]:
        """Class and count of keys, -1 and 0 for -1."""
        class_K = torch.where(key_K >= 0, self.num_classes - 1 - key_K % self.num_classes, -1)
        return class_K, key_K.clamp_min(0) // self.num_classes

    def best_cluster(self, entries_Q: Tensor) -> Tensor:
        """For each class here the cluster of largest count (ties: the smaller); int64 (R,), -1 where none."""
        key_Q = torch.where(entries_Q, self.count_Q * self.num_clusters + (self.num_clusters - 1 - self.cluster_Q), -1)
        key_R = key_Q.new_full((self.shard.size,), -1).scatter_reduce_(0, self.row_Q, key_Q, "amax")
        return torch.where(key_R >= 0, self.num_clusters - 1 - key_R % self.num_clusters, -1)


def agreement(table: CountTable, size_K: Tensor) -> Tensor:
    """F_y = 2PR / (P + R), float64 (R,): BCubed precision P and pairwise recall R of each class.

    P_y = sum_k T_yk^2 / (N_y M_k), R_y = sum_k T_yk (T_yk - 1) / (N_y (N_y - 1)). size_K: M_k over all ranks.
    A class of one sample has no pair that could be parted: R = 1. A class without samples: F = 0. No collective.
    """
    count_Q = table.count_Q.double()
    n_R = table.samples().double()
    p_R = table.by_row(count_Q.square() / size_K[table.cluster_Q].clamp_min(1)) / n_R.clamp_min(1)
    r_R = table.by_row(count_Q * (count_Q - 1)) / (n_R * (n_R - 1)).clamp_min(1)
    r_R = torch.where(n_R == 1, 1.0, r_R)
    return 2 * p_R * r_R / (p_R + r_R).clamp_min(torch.finfo(torch.float64).tiny)


def of_all_classes(rows_VR: Tensor, shard: Shard, num_classes: int, group: dist.ProcessGroup) -> Tensor:
    """Numbers of this rank's classes, float64 (V, R), as those of all, (V, C), on every rank. One all-reduce."""
    rows_VC = rows_VR.new_zeros(len(rows_VR), num_classes)
    rows_VC[:, shard.start : shard.stop] = rows_VR
    return all_reduce_(rows_VC, group)


class Cohesion:
    """Sums over the samples of each class, taken in by and by, from which its mean cosine follows. No collective."""

    def __init__(self, num_rows: int, x_PD: Tensor) -> None:
        """num_rows: R. x_PD: the samples' unit embeddings, float; sums are float32, of float64 rows float64."""
        self._x_PD = x_PD
        dtype = torch.promote_types(x_PD.dtype, torch.float32)
        self.sums_RD = torch.zeros(num_rows, x_PD.shape[1], dtype=dtype, device=x_PD.device)
        self._squares_R = torch.zeros(num_rows, dtype=torch.float64, device=x_PD.device)
        self._n_R = torch.zeros(num_rows, dtype=torch.float64, device=x_PD.device)

    def add(self, row_P: Tensor, counted_P: Tensor, part: slice) -> None:
        """Take in the counted samples of `part` of the points. row_P: int64, class minus the shard's first."""
        for point_q in (counted_P[part].nonzero()[:, 0] + (part.start or 0)).split(65536):
            add_rows_(self.sums_RD, row_P[point_q], self._x_PD, point_q)
            self._squares_R.index_add_(0, row_P[point_q], self._x_PD[point_q].double().square().sum(1))
            self._n_R.index_add_(0, row_P[point_q], torch.ones_like(point_q, dtype=torch.float64))

    def rho(self) -> Tensor:
        """The mean cosine over the pairs of distinct samples, float64 (R,); 0 below two samples.

        rho = (|sum z|^2 - sum |z|^2) / (N (N - 1)). Rows are unit up to the bank's rounding, which sum |z|^2 in
        place of N takes out.
        """
        pairs_R = self._n_R * (self._n_R - 1)
        rho_R = (self.sums_RD.double().square().sum(1) - self._squares_R) / pairs_R.clamp_min(1)
        return torch.where(pairs_R > 0, rho_R, 0.0)


def cohesion(x_PD: Tensor, row_P: Tensor, counted_P: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """rho_y, float64 (R,), and sum z, (R, D), of all counted samples at once (`Cohesion`). No collective."""
    sums = Cohesion(num_rows, x_PD)
    sums.add(row_P, counted_P, slice(0, len(row_P)))
    return sums.rho(), sums.sums_RD


def weighted_mean(values_C: Tensor, weight_C: Tensor) -> Tensor:
    """Mean over all classes, a float64 scalar; 0 when all weights are. No collective."""
    weight = weight_C.sum()
    return torch.where(weight > 0, (values_C * weight_C).sum() / weight.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def hard_level(f_C: Tensor, rho_C: Tensor, n_C: Tensor, *, purity_weight: float, shrinkage: float) -> Tensor:
    """h in [0, 1], float64 (C,): purity_weight (1 - F) + (1 - purity_weight) (1 - clip(rho, 0, 1)), shrunk.

    h = (N h_raw + a mean) / (N + a): a class of few samples says little about itself. The mean is over all
    classes with pairs, each weighing its samples; a class without pairs takes it. f_C, rho_C: float64, n_C any
    number type, of all classes. No collective.
    """
    raw_C = purity_weight * (1 - f_C) + (1 - purity_weight) * (1 - rho_C.clamp(0, 1))
    n_C = n_C.double()
    paired_C = n_C >= 2
    mean = weighted_mean(raw_C, torch.where(paired_C, n_C, 0.0))
    shrunk_C = (n_C * raw_C + shrinkage * mean) / (n_C + shrinkage).clamp_min(1)
    return torch.where(paired_C, shrunk_C, mean).clamp(0, 1)
