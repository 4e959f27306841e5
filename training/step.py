"""One optimizer step: micro-batches in, gradients of the joint loss, both optimizers moved.

    images -> backbone -> unit embedding -> packed gather -> head (+ contrastive, alignment) -> backward -> optimizers

The loss is differentiated in two stages: first down to the embeddings, then on through the backbone. The
head's memory is free before the backbone's backward begins, and its time can be told apart.

**A step that is not finite moves nothing.** If its loss or the norm of the backbone's gradient is nan or inf, weights,
centres, momenta and counts, BatchNorm's statistics and the running values of AdaFace and CurricularFace have the bits
that they had before. All ranks decide alike, without a word: the loss is of the global batch and the gradient the sum
over ranks, so both are the same numbers everywhere. On GPUs the decision is a number that fused optimizers and kernels
read, and no host waits for it; on CPUs the backbone's optimizer is just not called. Micro-batches of such a step do go
to the cluster service, which leaves out rows that are not finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from backbones import IMAGE_SIZE, normalise_pixels
from clustering.service.service import ClusterService
from configs.schema import ConfigError, RunConfig
from data.loading.batch import Batch
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from training.loss_scale import LossScale
from training.optim import set_learning_rate
from training.sharded import ShardedBackbone
from training.showing.timing import Stopwatch
from training.undo import Undo

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    skipped: Tensor
    """float32: 1 when loss or gradient was not finite and nothing was moved, else 0."""
    fault: Tensor
    """float32: the same, but 0 as well when all there was to it is that half precision's loss scale was too large."""
    norms_P: Tensor
    """Norm of each parameter's gradient before clipping, in the backbone's order. The same on all ranks."""
    sample_ids: tuple[Tensor, ...]
    """int64 (N,) of each micro-batch: sample ids of all ranks' rows, in rank order."""
    row_sums: tuple[Tensor, ...]
    """(N,) of each micro-batch: sums of the rows' unit embeddings, not finite where a row is not."""


class TrainStep:
    """Runs optimizer steps.

    service: None for training without clusters. optimizers: the backbone's, and the class centres'.
    """

    def __init__(
        self,
        *,
        backbone: DistributedDataParallel | ShardedBackbone,
        head: PartialFCHead,
        service: ClusterService | None,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self.backbone, self.head, self.service, self.optimizers = backbone, head, service, optimizers
        self.config, self.device = config, device
        self.backbone_time, self.head_time = Stopwatch(device, "backbone"), Stopwatch(device, "head")
        self.cluster_time, self.communication_time = Stopwatch(device, "clusters"), Stopwatch(device, "communication")
        self.loss_scale = LossScale(device) if config.train.precision == "fp16" else None
        self._undo = Undo([backbone.module, head])

    @property
    def stopwatches(self) -> dict[str, Stopwatch]:
        """Parts of the step by their names in the log. communication is within head."""
        return {
            "backbone": self.backbone_time,
            "head": self.head_time,
            "cluster": self.cluster_time,
            "communication": self.communication_time,
        }

    def __call__(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepValues:
        """Optimizer step number `step` on `batches`, one for each round of accumulation.

        Collectives, for each micro-batch: one all-gather, one all-reduce (one more for curricularface, two more with
        clusters), one reduce-scatter (with a bf16 wire an all-to-all); the backbone's, and one all-reduce of norms
        where it is sharded (`training.traffic` counts them); and what the cluster service's slice of work needs.
        """
        set_learning_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._undo.save()
        parts, ids, row_sums = list[Tensor](), list[Tensor](), list[Tensor]()
        for position, micro in enumerate(batches):
            last = position == len(batches) - 1
            with contextlib.nullcontext() if last else self.backbone.no_sync():
                values, gathered = self._accumulate(micro, step, 1 / len(batches))
            parts.append(values)
            ids.append(gathered.sample_ids_N)
            row_sums.append(gathered.x_ND.detach().sum(1))
            if self.service is not None:
                with self.cluster_time:
                    self.service.observe(gathered)
        norm, norms_P = self._clip()
        sums = torch.stack(parts)
        total, margin, contrastive, alignment = sums[:, :4].mean(0).unbind()
        skipped, fault = self._judge(total, norm)
        self._move(skipped)
        if self.service is not None:
            with self.cluster_time:
                self.service.advance(step)
        return StepValues(
            total=total,
            margin=margin,
            contrastive=contrastive,
            alignment=alignment,
            gradient_norm=norm,
            unusable_rows=sums[:, 4].sum(),
            skipped=skipped,
            fault=fault,
            norms_P=norms_P,
            sample_ids=tuple(ids),
            row_sums=tuple(row_sums),
        )

    def record(self, batch_size: int) -> None:
        """`model.graph`: micro-batches of so many images pass the backbone as CUDA graphs from now on.

        Call it once weights and buffers lie where they stay, while no other thread uses the GPU. No collective. Raises
        ConfigError for a backbone that cannot be recorded.
        """
        images_B3HW = torch.zeros(batch_size, 3, *IMAGE_SIZE, device=self.device)
        try:
            with self._autocast(cache=False):
                self.backbone.module.record(images_B3HW.to(memory_format=torch.channels_last))  # as loaders give them
        except torch.OutOfMemoryError:
            raise  # which says what it is
        except Exception as error:  # a network of timm's may do nearly anything
            first: BaseException = error
            while first.__context__ is not None:  # the end of a recording that has failed fails as well
                first = first.__context__
            said = str(first).strip().partition("\n")[0] or type(first).__name__
            raise ConfigError(
                "model.graph: expected a backbone that CUDA graphs can hold, which never waits for the host, got "
                f"{said:.200}: set it to false"
            ) from None

    def _autocast(self, *, cache: bool | None = None) -> torch.autocast:
        """cache: of the weights' casts; None: torch's own choice."""
        dtype = _AUTOCAST.get(self.config.train.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache)

    @torch.no_grad()
    def _clip(self) -> tuple[Tensor, Tensor]:
        """Norms of the backbone's gradient and of each parameter's, before it is clipped as by `clip_grad_norm_`."""
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale_(gradients)
        norms_P = torch.stack(torch._foreach_norm(gradients))
        if isinstance(self.backbone, ShardedBackbone):
            norms_P = self.backbone.norms(norms_P)
        norm = torch.linalg.vector_norm(norms_P)
        limit = self.config.optim.clip_norm or float("inf")
        torch.nn.utils.clip_grads_with_norm_(self.backbone.parameters(), limit, norm)
        return norm, norms_P

    def _judge(self, total: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """`StepValues.skipped` and `StepValues.fault`."""
        skipped = (~torch.isfinite(total + norm)).float()
        if self.loss_scale is None:
            return skipped, skipped
        loss_is_bad = (~torch.isfinite(total)).float()  # which no factor on the gradients has a part in
        at_the_end = self.loss_scale.update(skipped * (1 - loss_is_bad))
        return skipped, torch.maximum(loss_is_bad, at_the_end)

    def _move(self, skipped: Tensor) -> None:
        """Both optimizers' steps, and the buffers' return where there is none."""
        backbone_optimizer, centre_optimizer = self.optimizers
        if self.device.type == "cuda":
            backbone_optimizer.found_inf = skipped  # type: ignore[attr-defined]
            backbone_optimizer.step()
        elif not skipped.item():
            backbone_optimizer.step()
        with self.head_time:
            centre_optimizer.found_inf = skipped  # type: ignore[attr-defined]
            centre_optimizer.step()  # which makes the centres' gradient as well
        self._undo.restore(skipped)

    def _accumulate(self, micro: Batch, step: int, share: float) -> tuple[Tensor, GatheredBatch]:
        with self.backbone_time, self._autocast():
            embedding_BD = self.backbone(normalise_pixels(micro.images))

        with self.head_time:
            leaf_BD = embedding_BD.detach().float().requires_grad_()
            with self.communication_time:
                batch = self.head.gather(leaf_BD, micro.labels, micro.sample_ids)
            batch.x_ND.register_hook(lambda _: self.communication_time.start())  # of the reduce-scatter
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
            self.communication_time.stop()
        gradient_BD = leaf_BD.grad
        if self.loss_scale is not None and gradient_BD is not None:
            gradient_BD = gradient_BD * self.loss_scale.factor
        with self.backbone_time:
            embedding_BD.backward(gradient_BD)
        unusable = (batch.labels_N < 0).sum()
        values = torch.stack([t.detach().float() for t in (total, margin, contrastive, alignment, unusable)])
        return values, batch
