"""Partial FC for a training loop of one's own: embeddings and labels in, loss out, gradients as that loop wants."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import ConfigError, HeadConfig
from partial_fc.collectives import group_size
from partial_fc.head import PartialFCHead, ScaleGradient


class PartialFCInputError(ValueError):
    """Embeddings, labels or margins that the head cannot take; `PartialFC.forward` says on which ranks it is raised."""


class PartialFC(nn.Module):
    """Margin softmax over class centres that are split over the ranks of `group`.

    The module holds this rank's centres, `weight`, (C_local subcentres, D). Their gradient is complete where they lie:
    do not wrap the module in DDP. `CentreSGD` and `CentreAdamW` compute it as they apply it, and of sampled classes
    touch no other rows. Any optimizer of torch can be used instead: the gradient is then in .grad, with sample_rate <
    1 a sparse one, or with sparse_gradient=False a dense one.

    backbone_gradients: what becomes of the backbone's gradients. "averaged": DDP divides their sum by the number of
    ranks, as it does by default, so the embeddings' gradients come multiplied by that number; "summed": they do not.
    Either way the backbone ends with the gradient of the mean loss over the global batch.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_size: int,
        group: dist.ProcessGroup | None = None,
        backbone_gradients: Literal["averaged", "summed"] = "averaged",
        sparse_gradient: bool = True,
        product_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        """group: None for one process. seed: of the centres' start and of sampling. settings: of `HeadConfig`, by name:
        loss, margin, scale, sample_rate, subcentres and others.

        Raises ConfigError for a value out of range, ValueError for fewer than 2 classes, and without a group in a
        process that is one of several.
        """
        super().__init__()
        if group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "group: expected one, as this process is one of several: pass torch.distributed.group.WORLD to split "
                "the classes over all of them"
            )
        if backbone_gradients not in ("averaged", "summed"):
            raise ValueError(f"backbone_gradients: expected averaged or summed, got {backbone_gradients!r}")
        _refuse_settings(settings)
        self.head = PartialFCHead(
            num_classes=num_classes,
            embedding_size=embedding_size,
            config=HeadConfig(**settings),
            group=group,
            seed=seed,
            product_dtype=product_dtype,
            sparse_gradient=sparse_gradient,
        )
        self._factor = float(group_size(group)) if backbone_gradients == "averaged" else 1.0
        self._steps = 0

    @property
    def weight(self) -> nn.Parameter:
        """This rank's class centres, raw: cosines use them at unit length."""
        return self.head.weight

    def forward(
        self,
        embeddings_BD: Tensor,
        labels_B: Tensor,
        *,
        class_margins_C: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Mean loss over the labelled rows of the global batch: a scalar, the same on all ranks.

        embeddings_BD: this rank's, of any length and floating type; B the same on all ranks. labels_B: int64, -1 for
        rows that count for nothing. class_margins_C: a margin for each class of this rank instead of `margin`. step:
        seeds the sampling, which the forward passes in training do by themselves, by counting; give the micro-batches
        of one step the same, and they draw the same classes.

        Collectives: one all-gather and one all-reduce of two float64 a row of the global batch (curricularface: two);
        one reduce-scatter in backward. Raises PartialFCInputError for a label that is no class and for embeddings that
        are not finite, on all ranks, on CPUs; on GPUs, where looking would make every step wait, a device-side
        assertion says so. And for shapes that do not fit, on the ranks that have them.
        """
        self._check_shapes(embeddings_BD, labels_B, class_margins_C)
        x_BD = ScaleGradient.apply(embeddings_BD.float(), self._factor)  # type: ignore[no-untyped-call]
        batch = self.head.gather(x_BD, labels_B, torch.zeros_like(labels_B))
        self._check(batch.x_ND, batch.labels_N)
        drawn_by = self._steps if step is None else step
        loss: Tensor = self.head(batch, step=drawn_by, class_margins_C=class_margins_C)
        if self.training:
            self._steps += 1
        return loss

    def _check_shapes(self, embeddings_BD: Tensor, labels_B: Tensor, class_margins_C: Tensor | None) -> None:
        D, C = self.weight.shape[1], self.head.shard.size
        fits = embeddings_BD.dim() == 2 and embeddings_BD.shape[1] == D and labels_B.shape == embeddings_BD.shape[:1]
        if not fits or not len(labels_B):
            raise PartialFCInputError(
                f"expected embeddings (B, {D}) and labels (B,), B at least 1, got {tuple(embeddings_BD.shape)} and "
                f"{tuple(labels_B.shape)}"
            )
        if class_margins_C is not None and class_margins_C.shape != (C,):
            raise PartialFCInputError(
                f"class_margins_C: expected one margin for each of this rank's {C} classes, got shape "
                f"{tuple(class_margins_C.shape)}"
            )

    def _check(self, x_ND: Tensor, labels_N: Tensor) -> None:
        """Of the gathered batch, so that all ranks see the same and none waits for another in a later collective."""
        known = ((labels_N >= -1) & (labels_N < self.head.num_classes)).all()
        finite = torch.isfinite(x_ND).all()
        if labels_N.is_cuda:
            torch._assert_async(
                known & finite, "PartialFC: a label that is no class, or embeddings that are not finite"
            )
        elif not known:
            low, high = int(labels_N.min()), int(labels_N.max())
            raise PartialFCInputError(
                f"labels: expected -1 or 0 … {self.head.num_classes - 1}, got {low} … {high} in the global batch"
            )
        elif not finite:
            row = int((~torch.isfinite(x_ND)).any(1).nonzero()[0])
            raise PartialFCInputError(
                f"embeddings: row {row} of the global batch is not finite: has the training diverged?"
            )

    def get_extra_state(self) -> dict[str, int]:
        """Steps taken, from which the sampling goes on."""
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]


def _refuse_settings(settings: dict[str, Any]) -> None:
    """Raise ConfigError for names that are none of `HeadConfig`'s, and for those that its optimizer must be told."""
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: unknown setting{hint}")
        if name in ("missed_steps", "on_sphere"):
            raise ConfigError(f"{name}: expected with the optimizer, CentreSGD(catch_up=…, on_sphere=…), not here")
