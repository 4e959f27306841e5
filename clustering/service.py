"""The cluster service: all that training sees of clusters.

    observe(batch)    after each micro-batch: bank and centres take its embeddings in
    advance(step)     after each optimizer step: a few slices of the refresh under way; publishes at its end
    row_margins, hard_classes, contrastive, alignment, ramp     read by the losses of a step

Legend: N rows of the global batch, D embedding size, R classes of this rank, K clusters, M = N x k hard classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.align import alignment_loss
from clustering.bank import EmbeddingBank
from clustering.contrastive import Candidates, contrastive_loss
from clustering.dist_kmeans import KMeansRun
from clustering.errors import ClusterStateError
from clustering.hardness import CountTable, find_suspects
from clustering.margins import ramped
from clustering.published import Published, publish
from clustering.schedule import RefreshSchedule
from configs.schema import ClusteringConfig
from partial_fc.collectives import GatheredBatch, all_reduce_
from sharding import shard_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """How one class stands."""

    label: int
    hard_level: float
    margin: float
    samples: int
    """Samples that k-means has seen, suspects left out."""


class ClusterService:
    """Clusters of the training set beside its training. All ranks build it alike and call it in step."""

    def __init__(
        self,
        *,
        labels: npt.NDArray[np.int64],
        num_classes: int,
        dim: int,
        group: dist.ProcessGroup,
        device: torch.device,
        config: ClusteringConfig,
        margin: float,
        total_steps: int,
        steps_per_epoch: int,
        bank_dtype: torch.dtype = torch.bfloat16,
        product_dtype: torch.dtype = torch.float32,
    ) -> None:
        """labels: class of every training sample, the same on all ranks. dim: D. margin: m0, the head's.

        bank_dtype: of the stored embeddings. product_dtype: operands of the contrastive loss's matrix products.
        Raises ValueError when labels are not in [0, num_classes) or the margin is outside the config's bounds
        (KappaFace's margins have none).
        """
        if config.margin_rule != "kappaface" and not config.margin_low <= margin <= config.margin_high:
            raise ValueError(
                f"margin: expected {config.margin_low} … {config.margin_high} (clustering.margin_low, margin_high), "
                f"got {margin}"
            )
        self.config, self.margin, self.group, self.device = config, margin, group, device
        self.num_classes, self.product_dtype = num_classes, product_dtype
        self.num_clusters = num_classes + round(config.extra_clusters * num_classes)
        self.bank = EmbeddingBank(
            labels=labels, num_classes=num_classes, dim=dim, group=group, device=device, dtype=bank_dtype
        )
        self.classes = self.bank.shard
        self.clusters = shard_of(dist.get_rank(group), dist.get_world_size(group), self.num_clusters)
        self.schedule = RefreshSchedule.of(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.margins_C = torch.full((self.classes.size,), margin, device=device)
        self._run: KMeansRun | None = None
        self._run_began = 0
        self._candidates: Candidates | None = None
        self._published: Published | None = None
        self._done = 0

    # ---- read by a step ----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of publications so far."""
        return 0 if self._published is None else self._published.version

    @property
    def hard_levels_C(self) -> Tensor:
        """float32 (R,), h of this rank's classes; 0 before the first publication."""
        if self._published is None:
            return torch.zeros_like(self.margins_C)
        return self._published.hard_R.float()

    def ramp(self, step: int) -> float:
        """Weight of the cluster terms in this step, 0 … 1; 0 before the first publication."""
        return self.schedule.ramp(step) if self._published is not None else 0.0

    def row_margins(self, batch: GatheredBatch) -> Tensor:
        """Margin of each row, float32 (N,), as the head takes it: read on the rank that owns the row's class.

        The class's margin; for a suspect the smallest that any class has (both as far as the ramp of this step
        goes), so that the head is the plain one where the settings guide no margin; m0 for rows that lie
        elsewhere. No collective, no host sync.
        """
        margin_N = torch.full_like(batch.x_ND[:, 0], self.margin, requires_grad=False)
        if self._published is None or not self.classes.size:
            return margin_N
        row_N = batch.labels_N - self.classes.start
        here_N = (row_N >= 0) & (row_N < self.classes.size)
        margin_N = torch.where(here_N, self.margins_C[row_N.clamp(0, self.classes.size - 1)], margin_N)
        _, suspect_N = self._published.cluster_of(batch)
        smallest = ramped(self._published.smallest, self.margin, self.ramp(self._done))
        return torch.where(suspect_N & here_N, smallest, margin_N)

    def hard_classes(self, batch: GatheredBatch) -> Tensor | None:
        """The `hard_negatives` nearest classes of each row's class, int64 (M,), repetitions and -1 for none among them.

        The same on every rank. None while the ramp is 0, or without such a setting. No collective, no host sync.
        """
        if self._published is None or not self.config.hard_negatives or self.ramp(self._done) == 0:
            return None
        return self._published.neighbours(batch)

    def contrastive(self, batch: GatheredBatch) -> Tensor:
        """L_scc, a scalar (`clustering.contrastive`); a zero without graph before the first publication."""
        if self._published is None or self._candidates is None:
            return torch.zeros((), device=self.device)
        return contrastive_loss(
            batch,
            self._candidates,
            self._published.cluster_of(batch)[1],
            temperature=self.config.temperature,
            product_dtype=self.product_dtype,
        )

    def alignment(self, batch: GatheredBatch, weight_RD: Tensor) -> Tensor:
        """L_al, a scalar (`clustering.align`); a zero without graph before the first publication."""
        if self._published is None:
            return torch.zeros((), device=self.device)
        p = self._published
        return alignment_loss(batch, weight_RD, p.anchor_RD, p.f_R, self.classes.start)

    # ---- moved by training -------------------------------------------------------------------------------------

    def observe(self, batch: GatheredBatch) -> None:
        """Take the embeddings of a micro-batch into the bank and, by momentum, into the centres. No collective."""
        self.bank.update(batch)
        if self._published is not None:
            self._published.move(batch, self.config.centre_momentum, self.clusters, self.classes.start)

    def advance(self, step: int) -> None:
        """Work due after optimizer step `step` (from 0): slices of a refresh, its publication, the next one's start.

        Collectives: those of the slices (`KMeansRun.advance`), at its end those of `publish`; none otherwise.
        Raises ClusterStateError when ranks hold different versions at a publication.
        """
        self._done = step + 1
        if self._run is not None:
            until = self.schedule.slices_until(self._done - self._run_began, self._run.length)
            while self._run.done < until:
                self._run.advance()
            if self._run.done == self._run.length:
                self._adopt(self._publish(self._run))
                self._run = None
        if self.schedule.starts_after(self._done):
            self._run, self._run_began = self._new_run(from_class_means=self._published is None), self._done
        self._set_margins()

    def _new_run(self, *, from_class_means: bool) -> KMeansRun:
        start_SD = None if from_class_means or self._published is None else self._published.c_SD
        return KMeansRun(
            points=self.bank.points(),
            centres_SD=start_SD,
            num_clusters=self.num_clusters,
            num_classes=self.num_classes,
            iterations=self.config.iterations,
            block=self.config.block,
            gate=self._gate if self.config.noise_gate else None,
            group=self.group,
        )

    def _gate(self, cluster_P: Tensor) -> Tensor:
        class_P, assigned_P = self.bank.class_P, cluster_P >= 0
        table = CountTable.count(class_P, cluster_P, assigned_P, self.classes, self.num_classes, self.num_clusters)
        return assigned_P & ~find_suspects(table, class_P, cluster_P, self.group)

    def _publish(self, run: KMeansRun) -> Published:
        return publish(
            run,
            self.bank,
            self._published,
            config=self.config,
            margin=self.margin,
            num_classes=self.num_classes,
            group=self.group,
        )

    def _adopt(self, published: Published) -> None:
        self._published = published
        self._candidates = published.candidates(self.clusters)

    def _set_margins(self) -> None:
        if self._published is not None:
            self.margins_C = ramped(self._published.margin_R, self.margin, self.ramp(self._done))

    # ---- reported ----------------------------------------------------------------------------------------------

    def statistics(self, step: int) -> dict[str, float]:
        """Scalars for the log after `step` finished steps, the same on all ranks. No collective."""
        values = {"clusters/version": float(self.version), "clusters/ramp": self.ramp(step)}
        if self._published is not None:
            values |= {f"clusters/{name}": value for name, value in self._published.statistics.items()}
        return values

    def easiest_and_hardest(self, count: int) -> list[ClassReport] | None:
        """The `count` classes of smallest and the `count` of largest hard level, ascending, each class once.

        Over all ranks; classes without samples are left out; None before the first publication. One all-reduce.
        """
        if self._published is None:
            return None
        p = self._published
        order_R = p.hard_R.argsort(stable=True)
        order_R = order_R[p.samples_R[order_R] > 0]
        if len(order_R) > 2 * count:
            order_R = torch.cat([order_R[:count], order_R[len(order_R) - count :]])
        fields = (order_R + self.classes.start, p.hard_R[order_R], self.margins_C[order_R], p.samples_R[order_R])
        world_size = dist.get_world_size(self.group)
        table = torch.zeros(world_size, 2 * count, len(fields), dtype=torch.float64, device=self.device)
        table[dist.get_rank(self.group), : len(order_R)] = torch.stack([values.double() for values in fields], dim=1)
        rows = [row for row in all_reduce_(table, self.group).flatten(0, 1).tolist() if row[3] > 0]
        rows.sort(key=lambda row: (row[1], row[0]))
        if len(rows) > 2 * count:
            rows = rows[:count] + rows[-count:]
        return [ClassReport(label=int(y), hard_level=h, margin=m, samples=int(n)) for y, h, m, n in rows]

    # ---- saved -------------------------------------------------------------------------------------------------

    def _shape(self) -> dict[str, int]:
        return {
            "world_size": dist.get_world_size(self.group),
            "classes": self.num_classes,
            "clusters": self.num_clusters,
            "samples": self.bank.num_samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, a refresh under way included. Tensors are the service's own: save or copy them at once."""
        return {
            "shape": self._shape(),
            "version": self.version,
            "done": self._done,
            "bank": self.bank.state_dict(),
            "published": None if self._published is None else self._published.state_dict(),
            "run": None if self._run is None else self._run.state_dict(),
            "run_began": self._run_began,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on bit for bit where `state_dict` was taken. No collective.

        Raises ClusterStateError when the state is of other data or of another number of ranks.
        """
        for name, mine in self._shape().items():
            if state["shape"][name] != mine:
                raise ClusterStateError(
                    f"saved clusters are of {name} = {state['shape'][name]}, this run has {mine}: resume with the "
                    "same data, settings and number of ranks"
                )
        self.bank.load_state_dict(state["bank"])
        self._done, self._run_began = state["done"], state["run_began"]
        self._published = self._candidates = self._run = None
        self.margins_C = torch.full_like(self.margins_C, self.margin)
        if state["published"] is not None:
            self._adopt(Published.from_state_dict(state["published"], self.device))
        if state["run"] is not None:
            self._run = self._new_run(from_class_means=state["run"]["from_class_means"])
            self._run.load_state_dict(state["run"])
        self._set_margins()
