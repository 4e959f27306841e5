"""One refresh, from a snapshot of the bank to a version that can be published: k-means and publication, in slices.

It works on the embeddings as they were when it began; training goes on writing the bank. What goes wrong on one rank is
kept by the guard, and told to all at the end (`clustering.service.guard.agree`).

Legend: P samples of this rank's classes, S clusters of a shard, D embedding size.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.method.gate import clearly_elsewhere, suspects_of
from clustering.method.hardness import CountTable
from clustering.service.bank import EmbeddingBank
from clustering.service.dist_kmeans import KMeansRun
from clustering.service.guard import Guard
from clustering.service.pace import Plan
from clustering.service.publication import Publication, dominant_classes
from clustering.service.published import Published
from configs.schema import ClusteringConfig

_WORDS = 240
"""Bytes of a failure that are saved."""


class Refresh:
    """`advance()` does one slice. The number of slices is known beforehand, and the same on every rank."""

    def __init__(
        self,
        *,
        bank: EmbeddingBank,
        previous: Published | None,
        start_P: Tensor | None,
        config: ClusteringConfig,
        margin: float,
        num_classes: int,
        num_clusters: int,
        began: int,
        steps: int,
        group: dist.ProcessGroup,
        block: int | None = None,
    ) -> None:
        """previous: the version in use, from whose centres k-means starts; without one from means of the classes, or
        of the clusters start_P (int64 (P,), -1 for none). began: steps that training had finished. steps: over how
        many more this is spread. block: points of a slice, of a saved one that is to go on; None: as the settings say.
        No collective. Makes all buffers of size, so memory that lacks shows here.
        """
        self.began, self.plan = began, Plan(steps=steps, iterations=config.iterations)
        self.guard = Guard()
        self.done = 0
        self._bank, self._group = bank, group
        self._num_classes, self._num_clusters, self._gap = num_classes, num_clusters, config.noise_gap
        self.points = bank.snapshot()
        self._nobody_P = torch.zeros_like(self.points.seen_P)
        # A gate that held this refresh would close a circle: snapshot and k-means would then stay until Python looks
        # for circles, beside those of the next refresh.
        gate = functools.partial(type(self)._gate, weakref.proxy(self))
        self.run = KMeansRun(
            points=self.points,
            centres_SD=None if previous is None else previous.c_SD,
            num_clusters=num_clusters,
            iterations=config.iterations,
            block=block or config.block,
            gate=gate if config.noise_gate else None,
            group=group,
            start_P=start_P,
            guard=self.guard,
        )
        self._publication = Publication(
            self.run,
            bank,
            previous,
            config=config,
            margin=margin,
            num_classes=num_classes,
            group=group,
            guard=self.guard,
        )

    def _gate(self, cluster_P: Tensor) -> Tensor:
        """Points that have a cluster and are not suspect, bool (P,). One all-reduce."""
        bank = self._bank
        sizes = (bank.shard, self._num_classes, self._num_clusters)
        table = self.guard.run(
            "gate",
            lambda: CountTable.count(bank.class_P, cluster_P, cluster_P >= 0, *sizes),
            CountTable.empty(*sizes, cluster_P.device),
        )
        dominant_K, _ = dominant_classes(table, "gate", self.guard, self._group)
        return self.guard.run("gate", lambda: self._counted(table, dominant_K, cluster_P), self._nobody_P)

    def _counted(self, table: CountTable, dominant_K: Tensor, cluster_P: Tensor) -> Tensor:
        suspect_P = suspects_of(table, dominant_K, self._bank.class_P, cluster_P)
        if self._gap > 0:
            suspect_P = clearly_elsewhere(
                suspect_P,
                table,
                self.points.x_PD,
                self._bank.class_P,
                cluster_P,
                self.run.best_P,
                gap=self._gap,
                sums_RD=self.run.work_space(table.shard.size),
            )
        return (cluster_P >= 0) & ~suspect_P

    @property
    def slices(self) -> tuple[int, int]:
        """Slices outside of the iterations, and of each iteration."""
        each = self.run.slices_of_an_iteration
        return self.length - self.plan.iterations * each, each

    @property
    def length(self) -> int:
        return self.run.length + self._publication.length

    def take_plan(self, plan: Plan) -> None:
        """Before the first slice."""
        self.plan = plan
        self.run.limit(plan.iterations)

    def due(self, done: int) -> int:
        """Slices that are to be done when training has finished `done` steps."""
        return self.plan.slices_due(done - self.began, self.length)

    def advance(self) -> None:
        """The next slice. Collectives: those of `KMeansRun.advance` or `Publication.advance`."""
        if self.run.done < self.run.length:
            self.run.advance()
        else:
            # More than one where a resumed refresh does again what was done.
            while self._publication.done <= self.done - self.run.length:
                self._publication.advance()
        self.done += 1

    @property
    def published(self) -> Published | None:
        """The new version, after the last slice; None when something failed here."""
        return self._publication.published

    def state_dict(self) -> dict[str, Any]:
        """Tensors are the refresh's own, not copies. What the publication has is made anew.

        failure: uint8 (1, bytes), of this rank.
        """
        words = self.guard.failure.encode()[:_WORDS]
        failure = torch.zeros(1, _WORDS, dtype=torch.uint8)
        failure[0, : len(words)] = torch.tensor(list(words), dtype=torch.uint8)
        return {
            "began": self.began,
            "steps": self.plan.steps,
            "iterations": self.plan.iterations,
            "done": self.done,
            "block": self.run.block,
            "failure": failure,
            "x": self.points.x_PD,
            "run": self.run.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a refresh of the same construction at the slice where it was saved; over other ranks see
        `KMeansRun.load_state_dict`, and a publication begins anew. failure: of all ranks. No collective.
        """
        self.began = state["began"]
        failures = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in state["failure"].tolist()]
        rank = dist.get_rank(self._group)
        if len(failures) == dist.get_world_size(self._group):
            self.guard.failure = failures[rank]
        elif rank == 0:  # one that knows of it is enough to drop the refresh at its end
            self.guard.failure = next(filter(None, failures), "")
        self.take_plan(Plan(steps=state["steps"], iterations=state["iterations"]))
        self.points.x_PD.copy_(state["x"])
        same = self.run.load_state_dict(state["run"])
        self.done = state["done"] if same else self.run.done
