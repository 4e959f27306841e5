"""One optimizer step: micro-batches in, gradients of the joint loss, both optimizers moved.

    images -> backbone -> unit embedding -> packed gather -> head (+ contrastive, alignment) -> backward -> optimizers

The loss is differentiated in two stages: first down to the embeddings, then on through the backbone. The
head's memory is free before the backbone's backward begins, and its time can be told apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from backbones import normalise_pixels
from clustering.service import ClusterService
from configs.schema import RunConfig
from data.batch import Batch
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from training.optim import set_learning_rate
from training.timing import Stopwatch


@dataclass(frozen=True, slots=True)
class StepValues:
    """What one step produced, as scalars on the device: reading them is left to the log."""

    total: Tensor
    margin: Tensor
    contrastive: Tensor
    alignment: Tensor
    gradient_norm: Tensor
    unusable_rows: Tensor
    """Rows of the global batch without a label: images that did not decode."""


class TrainStep:
    """Runs optimizer steps.

    service: None for training without clusters. optimizers: the backbone's, and the class centres'.
    """

    def __init__(
        self,
        *,
        backbone: DistributedDataParallel,
        head: PartialFCHead,
        service: ClusterService | None,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self.backbone, self.head, self.service, self.optimizers = backbone, head, service, optimizers
        self.config, self.device = config, device
        self.head_time, self.cluster_time = Stopwatch(device), Stopwatch(device)

    def __call__(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepValues:
        """Optimizer step number `step` on `batches`, one for each round of accumulation.

        Collectives, for each micro-batch: one all-gather, one all-reduce (one more for curricularface, two more with
        clusters), one reduce-scatter (with a bf16 wire an all-to-all); once: DDP's gradient buckets, and what the
        cluster service's slice of work needs.
        """
        set_learning_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts: list[Tensor] = []
        for position, micro in enumerate(batches):
            last = position == len(batches) - 1
            with contextlib.nullcontext() if last else self.backbone.no_sync():
                values, gathered = self._accumulate(micro, step, 1 / len(batches))
            parts.append(values)
            if self.service is not None:
                with self.cluster_time:
                    self.service.observe(gathered)
        limit = self.config.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), limit)
        backbone_optimizer, centre_optimizer = self.optimizers
        backbone_optimizer.step()
        with self.head_time:
            centre_optimizer.step()  # which makes the centres' gradient as well
        if self.service is not None:
            with self.cluster_time:
                self.service.advance(step)
        sums = torch.stack(parts)
        total, margin, contrastive, alignment = sums[:, :4].mean(0).unbind()
        return StepValues(total, margin, contrastive, alignment, norm, sums[:, 4].sum())

    def _accumulate(self, micro: Batch, step: int, share: float) -> tuple[Tensor, GatheredBatch]:
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            embedding_BD = self.backbone(normalise_pixels(micro.images))

        with self.head_time:
            leaf_BD = embedding_BD.detach().float().requires_grad_()
            batch = self.head.gather(leaf_BD, micro.labels, micro.sample_ids)
            contrastive = alignment = torch.zeros((), device=self.device)
            if self.service is None:
                total = margin = self.head(batch, step=step)
            else:
                margin = self.head(
                    self.service.for_head(batch),
                    step=step,
                    row_margins_N=self.service.row_margins(batch),
                    hard_classes_M=self.service.hard_classes(batch),
                )
                total = margin
                ramp = self.service.ramp(step)
                if ramp > 0:
                    c = self.config.clustering
                    contrastive = self.service.contrastive(batch)
                    alignment = self.service.alignment(batch, self.head.weight)
                    total = margin + ramp * (c.contrastive_weight * contrastive + c.alignment_weight * alignment)
            (total * share).backward()
        embedding_BD.backward(leaf_BD.grad)
        unusable = (batch.labels_N < 0).sum()
        values = torch.stack([t.detach().float() for t in (total, margin, contrastive, alignment, unusable)])
        return values, batch
