"""The cluster service: all that training sees of clusters.

    observe(batch)    after each micro-batch: bank and centres take its embeddings in
    advance(step)     after each optimizer step: a few slices of the refresh under way; publishes at its end
    for_head, row_margins, hard_classes, contrastive, alignment, ramp     read by the losses of a step

Legend: N rows of the global batch, D embedding size, R classes of this rank, K clusters, M = N x k hard classes.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.errors import ClusterStateError
from clustering.method.align import alignment_loss
from clustering.method.contrastive import contrastive_loss
from clustering.method.margins import ramped
from clustering.nearest.float64_rows import prepare
from clustering.service.bank import EmbeddingBank
from clustering.service.class_report import ClassReport, easiest_and_hardest
from clustering.service.guard import Guard, agree
from clustering.service.pace import Pace, Stopwatch
from clustering.service.published import Published
from clustering.service.refresh import Refresh
from clustering.service.schedule import RefreshSchedule
from clustering.service.start import read_start, start_of
from clustering.step.choice import step_ops
from configs.schema import ClusteringConfig
from partial_fc.collectives import GatheredBatch
from sharding import shard_of

_LOG = logging.getLogger(__name__)


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
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """labels: class of every training sample, the same on all ranks. dim: D. margin: m0, the head's.

        bank_dtype: of the stored embeddings. product_dtype: operands of the contrastive loss's matrix products.
        stopwatch: measures slices; needed with `step_budget`. Raises ValueError when labels are not in
        [0, num_classes), when the margin is outside the config's bounds (KappaFace's margins have none), or without a
        stopwatch that is needed; ConfigError when `start` is not an assignment of these samples.
        """
        if config.margin_rule != "kappaface" and not config.margin_low <= margin <= config.margin_high:
            raise ValueError(
                f"margin: expected {config.margin_low} … {config.margin_high} (clustering.margin_low, margin_high), "
                f"got {margin}"
            )
        self.config, self.margin, self.group, self.device = config, margin, group, device
        self.num_classes, self.product_dtype = num_classes, product_dtype
        self.num_clusters = config.num_clusters(num_classes)
        self.bank = EmbeddingBank(
            labels=labels,
            num_classes=num_classes,
            dim=dim,
            group=group,
            device=device,
            dtype=bank_dtype,
            momentum=config.bank_momentum,
        )
        step_ops(torch.empty(0, dim, device=device))  # compiled and tried now, not in a step
        prepare(device)
        self.classes = self.bank.shard
        self.clusters = shard_of(dist.get_rank(group), dist.get_world_size(group), self.num_clusters)
        self.schedule = RefreshSchedule.of(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.margins_C = torch.full((self.classes.size,), margin, device=device)
        self._smallest = torch.tensor(margin, device=device)
        self._margins_of = (0, 0.0)  # version and ramp
        self.failed_refreshes = 0
        self._refresh: Refresh | None = None
        self._pace = Pace(config.step_budget, stopwatch)
        self._first_published: int | None = None
        self._start_I = read_start(config.start, num_samples=len(labels), num_clusters=self.num_clusters)
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
        return self.schedule.ramp(step, self._first_published) if self._published is not None else 0.0

    def row_margins(self, batch: GatheredBatch) -> Tensor:
        """Margin of each row, float32 (N,), as the head takes it: read on the rank that owns the row's class.

        The class's margin; for a suspect the smallest that any class has (both as far as the ramp of this step
        goes), so that the head is the plain one where the settings guide no margin; m0 for rows that lie
        elsewhere. No collective, no host sync.
        """
        plain_N = torch.full_like(batch.x_ND[:, 0], self.margin, requires_grad=False)
        if self._published is None or not self.classes.size:
            return plain_N
        return self._published.row_margins(batch, plain_N, self.margins_C, self._smallest, self.classes.start)

    def for_head(self, batch: GatheredBatch) -> GatheredBatch:
        """The batch as the margin softmax takes it: labels of suspects are -1, if the version drops them, while
        the ramp is above 0. The same on every rank. No collective, no host sync.
        """
        if self._published is None or not self._published.drops_suspects or self.ramp(self._done) == 0:
            return batch
        labels_N = torch.where(self._published.cluster_of(batch)[1], -1, batch.labels_N)
        return dataclasses.replace(batch, labels_N=labels_N)

    def hard_classes(self, batch: GatheredBatch) -> Tensor | None:
        """The `hard_negatives` nearest classes of each row's class, int64 (M,), repetitions and -1 for none among them.

        The same on every rank. None while the ramp is 0, or without such a setting. No collective, no host sync.
        """
        if self._published is None or not self.config.hard_negatives or self.ramp(self._done) == 0:
            return None
        return self._published.neighbours(batch)

    def contrastive(self, batch: GatheredBatch) -> Tensor:
        """L_scc, a scalar (`clustering.method.contrastive`); a zero without graph before the first publication."""
        if self._published is None:
            return torch.zeros((), device=self.device)
        p = self._published
        return contrastive_loss(
            batch,
            p.pulled(self.clusters, self.classes.start).columns,
            p.cluster_of(batch)[1],
            temperature=self.config.temperature,
            product_dtype=self.product_dtype,
        )

    def alignment(self, batch: GatheredBatch, weight_RD: Tensor) -> Tensor:
        """L_al, a scalar (`clustering.method.align`); a zero without graph before the first publication."""
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

        A refresh that fails on any rank is dropped on all: the version in use stays, the next refresh starts at its
        time. Collectives: those of the slices (`Refresh.advance`), one or two all-reduces at its start and one at its
        end (one more of what failed); none otherwise. Raises ClusterStateError when ranks hold different versions.
        """
        self._done = step + 1
        self._pace.step()
        if self._refresh is not None:
            due = max(0, self._refresh.due(self._done) - self._refresh.done)  # over other ranks it may be ahead
            with self._pace.slices(due):
                for _ in range(due):
                    self._refresh.advance()
            if self._refresh.done == self._refresh.length:
                self._conclude(self._refresh)
        if self.schedule.starts_after(self._done):
            self._begin()
        self._set_margins()

    def _begin(self) -> None:
        guard = Guard()
        refresh = guard.run("start", self._new_refresh, None)
        if self._all_well(guard.failure) and refresh is not None:
            longest = self.schedule.longest(self._done)
            refresh.take_plan(self._pace.plan(refresh.plan, refresh.slices, longest, self.group, self.device))
            self._refresh = refresh

    def _new_refresh(self, block: int | None = None) -> Refresh:
        first = self._published is None
        return Refresh(
            bank=self.bank,
            previous=self._published,
            start_P=start_of(self._start_I, self.bank.sample_P) if first else None,
            config=self.config,
            margin=self.margin,
            num_classes=self.num_classes,
            num_clusters=self.num_clusters,
            began=self._done,
            steps=self.schedule.span,
            group=self.group,
            block=block,
        )

    def _conclude(self, refresh: Refresh) -> None:
        self._refresh = None
        if self._all_well(refresh.guard.failure) and refresh.published is not None:
            self._adopt(refresh.published)
            self._first_published = self._first_published or self._done

    def _all_well(self, failure: str) -> bool:
        """Whether nothing failed on any rank; else count and log it, on all ranks alike."""
        failed = agree(self.version + 1, failure, self.group, self.device)
        if failed:
            self.failed_refreshes += 1
            if dist.get_rank(self.group) == 0:
                stays = f"version {self.version} of the clusters stays" if self.version else "training stays plain"
                _LOG.warning(
                    "a refresh of the clusters failed after %d steps (%s): %s; the next one starts at its time",
                    self._done, failed, stays,
                )  # fmt: skip
        return not failed

    def _adopt(self, published: Published) -> None:
        self._published = published
        published.pulled(self.clusters, self.classes.start)  # made now, as the host waits for it

    def _set_margins(self) -> None:
        ramp = self.ramp(self._done)
        if self._published is not None and self._margins_of != (self.version, ramp):
            self.margins_C = ramped(self._published.margin_R, self.margin, ramp)
            self._smallest = ramped(self._published.smallest, self.margin, ramp)
            self._margins_of = (self.version, ramp)

    # ---- reported ----------------------------------------------------------------------------------------------

    def statistics(self, step: int) -> dict[str, float]:
        """Scalars for the log after `step` finished steps, the same on all ranks. No collective."""
        values = {
            "clusters/version": float(self.version),
            "clusters/ramp": self.ramp(step),
            "clusters/failed_refreshes": float(self.failed_refreshes),
        }
        if self._refresh is not None and self._pace.limited:
            values["clusters/refresh_steps"] = float(self._refresh.plan.steps)
            values["clusters/refresh_iterations"] = float(self._refresh.plan.iterations)
        if self._published is not None:
            values |= {f"clusters/{name}": value for name, value in self._published.statistics.items()}
        return values

    def suspects(self) -> Tensor | None:
        """Samples that look mislabelled in the version in use, bool (num_samples,); None before the first."""
        return None if self._published is None else self._published.code_I < 0

    def easiest_and_hardest(self, count: int) -> list[ClassReport] | None:
        """As `clustering.service.class_report` has it; None before the first publication. One all-reduce after it."""
        if self._published is None:
            return None
        return easiest_and_hardest(self._published, self.margins_C, self.classes.start, count, self.group)

    # ---- saved -------------------------------------------------------------------------------------------------

    def _shape(self) -> dict[str, int]:
        return {
            "classes": self.num_classes,
            "clusters": self.num_clusters,
            "samples": self.bank.num_samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, a refresh under way included, as this rank holds it: `kind_of` says how it is cut.

        Tensors are the service's own: save or copy them at once.
        """
        return {
            "shape": self._shape(),
            "version": self.version,
            "done": self._done,
            "bank": self.bank.state_dict(),
            "published": None if self._published is None else self._published.state_dict(),
            "first_published": self._first_published,
            "failed_refreshes": self.failed_refreshes,
            "refresh": None if self._refresh is None else self._refresh.state_dict(),
            "pace": self._pace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit, on any number of ranks. No collective.

        state: with the rows that are this rank's now. Raises ClusterStateError when it is of other data.
        """
        for name, mine in self._shape().items():
            if state["shape"][name] != mine:
                raise ClusterStateError(
                    f"saved clusters are of {name} = {state['shape'][name]}, this run has {mine}: resume with the "
                    "same data and settings"
                )
        published, refresh = state["published"] or {"own_centres": True}, state["refresh"] or {"block": 0}
        if "own_centres" not in published or "block" not in refresh:
            raise ClusterStateError("saved clusters are of an earlier version of this program: start a new run")
        self.bank.load_state_dict(state["bank"])
        self._done, self._first_published = state["done"], state["first_published"]
        self.failed_refreshes = state["failed_refreshes"]
        self._pace.load_state_dict(state["pace"])
        self._published = self._refresh = None
        self.margins_C = torch.full_like(self.margins_C, self.margin)
        self._smallest = torch.full_like(self._smallest, self.margin)
        self._margins_of = (0, 0.0)
        if state["published"] is not None:
            self._adopt(Published.from_state_dict(state["published"], self.device))
        if state["refresh"] is not None:
            self._refresh = self._new_refresh(refresh["block"])
            self._refresh.load_state_dict(state["refresh"])
        self._set_margins()
