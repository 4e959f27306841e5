"""How a finished run of k-means becomes the next version: in slices, each at most about as long as one of k-means.

Every stage is a function of the run's state and of what the stages before it gave, so that a resumed refresh simply
does them again. Local work goes through the guard, collectives do not: on a rank that failed they add nothing.

Legend: P samples of this rank's classes, R its classes, C all classes, K clusters, S clusters or classes of a shard,
D embedding size, k neighbours of a class, Q non-zero entries of T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.method.align import match_classes
from clustering.method.hardness import Cohesion, CountTable, agreement, hard_level, of_all_classes, weighted_mean
from clustering.method.kappaface import kappaface_margins
from clustering.method.margins import class_margins, mean_margin, smallest_margin
from clustering.method.neighbours import NearestClasses
from clustering.service.bank import EmbeddingBank
from clustering.service.dist_kmeans import KMeansRun
from clustering.service.guard import Guard
from clustering.service.published import Published
from clustering.service.shards import show_rows, unit_or
from configs.schema import ClusteringConfig
from partial_fc.collectives import all_reduce_
from sharding import all_shards


def dominant_classes(table: CountTable, what: str, guard: Guard, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`CountTable.best_class` of all entries; this rank's part through the guard. One all-reduce."""
    nothing_K = table.cluster_Q.new_full((table.num_clusters,), -1)
    key_K = guard.run(what, lambda: table.class_keys(torch.ones_like(table.row_Q, dtype=torch.bool)), nothing_K)
    return table.class_of(all_reduce_(key_K, group, dist.ReduceOp.MAX))


class Publication:
    """`advance()` does the next stage; after the last one `published` is there, unless something failed here.

    Collectives of all stages: one reduce of every rank's centres with `own_centres`; all-reduces of one int64 a
    cluster (a few, and two a round of the matching), of five float64 a class, of a few numbers, of one int32 a sample,
    of one float64 a cluster and of the table of neighbours; a broadcast of every rank's centres, one more of its
    anchors with neighbours.
    """

    def __init__(
        self,
        run: KMeansRun,
        bank: EmbeddingBank,
        previous: Published | None,
        *,
        config: ClusteringConfig,
        margin: float,
        num_classes: int,
        group: dist.ProcessGroup,
        guard: Guard,
    ) -> None:
        """run: of which the publication is made, once all its slices are done. margin: m0."""
        self._run, self._bank, self._previous, self._config, self._margin = run, bank, previous, config, margin
        self._num_classes, self._group, self._guard = num_classes, group, guard
        self.published: Published | None = None
        self.done = 0
        shard, D = bank.shard, run.points.x_PD.shape[1]
        device = run.points.x_PD.device
        self._row_P = bank.class_P - shard.start
        self._class_shards = all_shards(dist.get_world_size(group), num_classes)
        # Made now: what collectives carry must be there on a rank whose memory runs out later.
        self._cohesion = Cohesion(shard.size, run.points.x_PD)
        self._anchor_RD = torch.zeros(shard.size, D, device=device)
        self._shown_XD = torch.empty(max(other.size for other in self._class_shards), D, device=device)
        self._code_I = torch.zeros(bank.num_samples, dtype=torch.int32, device=device)
        self._weight_K = torch.zeros(run.num_clusters, dtype=torch.float64, device=device)
        self._numbers_5R = torch.zeros(5, shard.size, dtype=torch.float64, device=device)
        self._moved = torch.zeros((), dtype=torch.int64, device=device)
        self._kept_2 = torch.zeros(2, dtype=torch.int64, device=device)  # of the last suspects: still so, all
        self._owned_P = torch.zeros_like(run.counted_P)
        self._nearest = NearestClasses(
            num_rows=shard.size,
            first_class=shard.start,
            num_classes=num_classes,
            count=config.hard_negatives,
            device=device,
        )
        self._stages = self._plan()

    def _plan(self) -> list[tuple[Any, ...]]:
        """Methods and what they are given; as many on every rank. Not bound to this object: that would be a circle, and
        all of the refresh would stay until Python looks for circles, beside the next one."""
        added = self._run.added
        parts = range(0, self._bank.largest, added)
        ranks = range(len(self._class_shards))
        rows = range(0, self._class_shards[0].size, self._run.block) if self._config.hard_negatives else ()
        here = type(self)
        owned = [(here._own_centres, rank, part) for rank in ranks for part in range(self._run.mean_parts)]
        return [
            (here._count,),
            *((here._cohere, slice(start, start + added)) for start in parts),
            (here._levels_and_margins,),
            (here._match,),
            *(owned if self._config.own_centres else ()),
            (here._code,),
            *((here._anchors, rank) for rank in ranks),
            (here._weights,),
            *((here._neighbours, rank, start) for rank in ranks for start in rows),
            (here._finish,),
        ]

    @property
    def length(self) -> int:
        """Stages in all; the same on every rank."""
        return len(self._stages)

    @torch.no_grad()
    def advance(self) -> None:
        stage, *given = self._stages[self.done]
        stage(self, *given)
        self.done += 1

    def _counted(self) -> CountTable:
        run, bank = self._run, self._bank
        return CountTable.count(
            bank.class_P, run.index_P, run.counted_P, bank.shard, self._num_classes, run.num_clusters
        )

    def _count(self) -> None:
        empty = CountTable.empty(self._bank.shard, self._num_classes, self._run.num_clusters, self._code_I.device)
        self._table = self._guard.run("count", self._counted, empty)
        self._size_K = self._table.cluster_sizes(self._group)
        _, self._largest_K = dominant_classes(self._table, "count", self._guard, self._group)

    def _cohere(self, part: slice) -> None:
        def add() -> None:
            self._cohesion.add(self._row_P, self._run.counted_P, part)

        self._guard.run("cohesion", add, None)

    def _levels_and_margins(self) -> None:
        self._guard.run("hard levels", self._measure, None)
        numbers_5C = of_all_classes(self._numbers_5R, self._bank.shard, self._num_classes, self._group)
        all_reduce_(self._kept_2, self._group)
        self._guard.run("margins", lambda: self._judge(numbers_5C), None)

    def _measure(self) -> None:
        """F, rho, counted samples, suspects and the former hard level of each class here."""
        run, R = self._run, self._bank.shard.size
        suspect_P = (run.index_P >= 0) & ~run.counted_P
        f_R, rho_R, n_R, suspects_R, former_R = self._numbers_5R
        f_R.copy_(agreement(self._table, self._size_K))
        rho_R.copy_(self._cohesion.rho())
        n_R.copy_(self._table.samples())
        suspects_R.copy_(torch.bincount(self._row_P[suspect_P], minlength=R))
        if self._previous is not None:
            former_R.copy_(self._previous.hard_R)
            before_P = self._previous.code_I[self._bank.sample_P] < 0
            self._kept_2.copy_(torch.stack([(before_P & suspect_P).sum(), before_P.sum()]))

    def _judge(self, numbers_5C: Tensor) -> None:
        """Hard levels and margins of all classes, the same arithmetic on the same numbers on every rank."""
        c, (f_C, rho_C, n_C, suspects_C, former_C) = self._config, numbers_5C
        hard_C = hard_level(f_C, rho_C, n_C, purity_weight=c.purity_weight, shrinkage=c.shrinkage)
        if self._previous is not None:
            hard_C = torch.lerp(hard_C, former_C, c.hard_level_momentum)
        suspects = suspects_C.sum()
        still, before = self._kept_2
        enough = (suspects >= c.drop_from * (suspects + n_C.sum())) & (suspects > 0)
        sure = still >= c.drop_kept * before.clamp_min(1)  # of a first version only where any will do
        self._drops = enough & sure & c.drop_suspects
        # Suspects that the margin softmax sees, at the smallest margin.
        trained = torch.where(self._drops, 0, suspects)
        if c.margin_rule == "kappaface":
            dim = self._anchor_RD.shape[1]
            margin_C = kappaface_margins(rho_C, n_C, dim=dim, margin=self._margin)
        else:
            margin_C = class_margins(
                hard_C,
                n_C,
                suspects=trained,
                margin=self._margin,
                low=c.margin_low,
                high=c.margin_high,
                delta=c.margin_delta,
                direction=c.direction,
            )
        self._f_C, self._n_C, self._hard_C, self._margin_C = f_C, n_C, hard_C, margin_C
        self._suspects, self._trained = suspects, trained

    def _match(self) -> None:
        def attempt(work: Callable[[], Tensor], nothing_K: Tensor) -> Tensor:
            return self._guard.run("matching", work, nothing_K)

        self._class_K, self._owner_K = match_classes(self._table, self._group, attempt)

    def _own_centres(self, rank: int, part: int) -> None:
        """The centres of a rank, of their owners' samples alone."""
        if rank == part == 0:
            self._owned_P.copy_(self._guard.run("centres", self._owned, torch.zeros_like(self._owned_P)))
        self._run.mean_of(rank, part, self._owned_P)

    def _owned(self) -> Tensor:
        """Counted samples whose class owns the cluster they are in, bool (P,)."""
        return self._run.counted_P & (self._owner_K[self._run.index_P.clamp_min(0)] == self._bank.class_P)

    def _code(self) -> None:
        self._code_I.zero_()
        self._guard.run("assignments", self._fill_code, None)
        all_reduce_(self._code_I, self._group)
        all_reduce_(self._moved, self._group)

    def _fill_code(self) -> None:
        index_P, bank = self._run.index_P, self._bank
        code_P = torch.where(self._run.counted_P, index_P + 1, -index_P - 1).int()
        self._code_I[bank.sample_P] = code_P
        if self._previous is not None:
            self._moved.copy_((code_P.abs() != self._previous.code_I[bank.sample_P].abs()).sum())

    def _anchors(self, rank: int) -> None:
        """Centre of each class's matched cluster, fetched from wherever it lies; else the class's own mean."""
        run, clusters = self._run, self._run.shards[rank]
        shown_SD = run.show(rank)

        def take() -> None:
            if rank == 0:
                sums_RD = self._cohesion.sums_RD
                self._anchor_RD.copy_(unit_or(sums_RD, torch.zeros_like(sums_RD)))
            row_S = self._class_K[clusters.start : clusters.stop] - self._bank.shard.start
            here_S = ((row_S >= 0) & (row_S < self._bank.shard.size)).nonzero()[:, 0]
            self._anchor_RD[row_S[here_S]] = shown_SD[here_S].float()

        self._guard.run("anchors", take, None)

    def _weights(self) -> None:
        """w_k: the owner's samples in k over its samples in all clusters it owns."""
        self._weight_K.zero_()
        self._guard.run("weights", self._fill_weights, None)
        all_reduce_(self._weight_K, self._group)

    def _fill_weights(self) -> None:
        table = self._table
        owned_Q = self._owner_K[table.cluster_Q] == table.row_Q + table.shard.start
        count_Q = torch.where(owned_Q, table.count_Q, 0).double()
        share_Q = count_Q / table.by_row(count_Q)[table.row_Q].clamp_min(1)
        self._weight_K.index_add_(0, table.cluster_Q, share_Q)

    def _neighbours(self, rank: int, start: int) -> None:
        shard = self._class_shards[rank]
        if start == 0:
            self._shown_SD = show_rows(self._anchor_RD, shard, rank, self._group, self._shown_XD)
        rows = slice(start, start + self._run.block)

        def compare() -> None:
            self._nearest.compare(self._anchor_RD, rows, self._shown_SD, shard.start)

        self._guard.run("neighbours", compare, None)

    def _finish(self) -> None:
        neighbour_Ck = all_reduce_(self._nearest.table(), self._group)
        self.published = self._guard.run("publication", lambda: self._assemble(neighbour_Ck), None)

    def _assemble(self, neighbour_Ck: Tensor) -> Published:
        bank, own = self._bank, slice(self._bank.shard.start, self._bank.shard.stop)
        hard_R, margin_R = self._hard_C[own].clone(), self._margin_C[own].clone()
        for what, values in (("anchors", self._anchor_RD), ("hard levels", hard_R), ("margins", margin_R)):
            if not bool(torch.isfinite(values).all()):
                raise FloatingPointError(f"{what} are not finite")
        return Published(
            version=1 if self._previous is None else self._previous.version + 1,
            c_SD=self._run.centres_SD.float(),
            anchor_RD=self._anchor_RD,
            code_I=self._code_I,
            class_K=self._class_K,
            owner_K=self._owner_K,
            weight_K=self._weight_K.float(),
            f_R=self._f_C[own].float(),
            hard_R=hard_R,
            samples_R=self._table.samples(),
            margin_R=margin_R,
            smallest=smallest_margin(self._margin_C, self._margin),
            neighbour_Ck=neighbour_Ck,
            drops_suspects=bool(self._drops),
            own_centres=self._config.own_centres,
            statistics=self._summary(bank.num_samples),
        )

    def _summary(self, num_samples: int) -> dict[str, float]:
        """Scalars for the log."""
        total, n_C = max(1, int(self._size_K.sum())), self._n_C
        seen, suspects = int((self._code_I != 0).sum()), float(self._suspects)
        numbers = {
            "seen": seen / max(1, num_samples),
            "suspects": suspects / max(1, seen),
            "suspects_kept": int(self._kept_2[0]) / max(1, int(self._kept_2[1])),
            "drops_suspects": float(self._drops),
            "moved": int(self._moved) / max(1, seen),
            "purity": float(self._largest_K.sum()) / total,
            "empty": float((self._size_K == 0).sum()) / max(1, len(self._size_K)),
            "agreement": float(weighted_mean(self._f_C, n_C)),
        }
        for name, values_C, centre in (
            ("hard_level", self._hard_C, weighted_mean(self._hard_C, n_C)),
            ("margin", self._margin_C, mean_margin(self._margin_C, n_C, self._trained)),
        ):
            deviation = weighted_mean((values_C - weighted_mean(values_C, n_C)).square(), n_C).sqrt()
            numbers |= {f"{name}_mean": float(centre), f"{name}_deviation": float(deviation)}
        return numbers
