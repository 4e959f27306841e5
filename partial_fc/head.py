"""The Partial FC head: this rank's class centres, and the margin softmax over the centres of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import HeadConfig
from partial_fc.adaptive import AdaFace, CurricularFace, MagFace
from partial_fc.catch_up import bring_up_to_date, settle
from partial_fc.collectives import GatheredBatch, gather_batch, group_rank, group_size
from partial_fc.margins import TargetMargin, target_margin
from partial_fc.negatives import InterclassFilter, Negatives
from partial_fc.sampling import sample_rows
from partial_fc.softmax import SoftmaxSettings, streaming_margin_softmax, target_cosines
from partial_fc.tiles import SampledRows
from sharding import shard_of

_INIT_BLOCK = 4096  # classes that share one generator, so that a centre's start does not depend on the ranks
_INIT_STD = 0.01
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def initial_centres(start: int, stop: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal(0, 0.01) rows for classes [start, stop): a pure function of (seed, class), (stop-start, D)."""
    centres_CD = torch.empty(stop - start, dim, dtype=dtype)
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        # The CPU generator takes 32 bits of its seed only: hash seed and block into them.
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0]))
        rows = torch.randn(_INIT_BLOCK, dim, generator=generator) * _INIT_STD
        first = block * _INIT_BLOCK
        low, high = max(start, first), min(stop, first + _INIT_BLOCK)
        centres_CD[low - start : high - start] = rows[low - first : high - first]
    return centres_CD


class HeadStateError(ValueError):
    """Saved class centres do not fit this head."""


class ScaleGradient(torch.autograd.Function):
    """The input itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class PartialFCHead(nn.Module):
    """Margin softmax over `num_classes` classes whose centres are split over the ranks of `group`.

    weight: (C_local K, D), the K centres of each class of `self.shard`, float32 or bf16 as `config.centre_dtype` says;
    any number of classes and ranks, a rank may own none. Its gradient is exact and needs no further reduction. The
    optimizers of `partial_fc.optim` compute it themselves; for others it is in .grad, sparse with sample_rate < 1
    unless told otherwise.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_size: int,
        config: HeadConfig,
        group: dist.ProcessGroup | None,
        seed: int,
        product_dtype: torch.dtype = torch.float32,
        sparse_gradient: bool = True,
    ) -> None:
        """group: None for this process alone. sparse_gradient: False gives a dense one also when classes are sampled,
        for optimizers that know no other.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a softmax needs at least 2 classes, got {num_classes}: check the data's labels")
        self.num_classes, self.config, self.group, self.seed = num_classes, config, group, seed
        self.shard = shard_of(group_rank(group), group_size(group), num_classes)
        K = config.subcentres
        dtype = _DTYPES[config.centre_dtype]
        self.register_state_dict_pre_hook(_settle_centres)  # type: ignore[no-untyped-call]
        self.weight = nn.Parameter(
            initial_centres(self.shard.start * K, self.shard.stop * K, embedding_size, seed, dtype)
        )
        self.margin = target_margin(config.loss, m1=config.m1, m3=config.m3, straight_through=config.straight_through)
        self.magface = _magface(config) if config.loss == "magface" else None
        self.adaface = self.curricular = None
        if config.loss == "adaface":
            self.adaface = AdaFace(spread=config.quality_spread, momentum=config.running_momentum)
        if config.loss == "curricularface":
            self.curricular = CurricularFace(momentum=config.running_momentum)
        self.settings = SoftmaxSettings(
            scale=config.scale,
            num_classes=num_classes,
            first_class=self.shard.start,
            subcentres=K,
            impl=config.impl,
            product_dtype=product_dtype,
            sparse_gradient=sparse_gradient,
        )

    def get_extra_state(self) -> dict[str, int]:
        """What the weight alone does not say: how it is cut."""
        return {
            "num_classes": self.num_classes,
            "subcentres": self.config.subcentres,
            "world_size": group_size(self.group),
            "rank": group_rank(self.group),
        }

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Raises HeadStateError when the state is of another number of classes or ranks, or of another rank."""
        for name, mine in self.get_extra_state().items():
            if state.get(name) != mine:
                raise HeadStateError(
                    f"class centres were saved with {name} = {state.get(name)}, this head has {mine}: load them with "
                    "the same classes, sub-centres, ranks and order of ranks"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (extra := state_dict.get(prefix + "_extra_state")) is not None:
            self.set_extra_state(extra)  # refuses before anything is overwritten
        super()._load_from_state_dict(state_dict, prefix, *args)

    def gather(self, embeddings_BD: Tensor, labels_B: Tensor, sample_ids_B: Tensor) -> GatheredBatch:
        """The batch of all ranks, as `forward` wants it, from this rank's raw float32 embeddings; see
        `gather_batch`."""
        reads_length = self.magface is not None or self.adaface is not None
        return gather_batch(
            F.normalize(embeddings_BD),
            labels_B,
            sample_ids_B,
            self.group,
            length_B=embeddings_BD.norm(dim=1) if reads_length else None,
            wire_dtype=_DTYPES[self.config.wire_dtype],
        )

    def local_classes(self, labels_N: Tensor) -> Tensor:
        """Class of this shard that each label is, from 0; -1 where another rank owns it or the label is -1."""
        mine_N = (labels_N >= self.shard.start) & (labels_N < self.shard.stop)
        return torch.where(mine_N, labels_N - self.shard.start, -1)

    def forward(
        self,
        batch: GatheredBatch,
        *,
        step: int,
        class_margins_C: Tensor | None = None,
        row_margins_N: Tensor | None = None,
        hard_classes_M: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over the rows of the global batch that have a label: a scalar, the same on all ranks.

        class_margins_C: float32 (C_local,), a margin for each class of this shard. row_margins_N: float32 (N,),
        a margin for each row instead, read on the rank that owns the row's class. Neither: `config.margin`.
        step: seeds the sampling, which draws the same classes for any number of ranks. hard_classes_M: int64, classes
        that take part besides those, the same on all ranks; -1 for none. Collectives: one all-reduce of 2N float64 in
        forward (curricularface: two), none in backward. No host sync, but for a sampled gradient that goes to .grad.
        """
        target_N, valid_N = self.local_classes(batch.labels_N), batch.labels_N >= 0
        margin_N = self._margins(batch, target_N, class_margins_C, row_margins_N)
        sampled: SampledRows | None = None
        if self.config.sample_rate < 1 and self.shard.size:
            named_M = target_N
            if hard_classes_M is not None:
                named_M = torch.cat([target_N, self.local_classes(hard_classes_M)])
            sampled = sample_rows(
                named_M, self.shard, self.num_classes, self.config.sample_rate, seed=self.seed, step=step
            )
        bring_up_to_date(self.weight, sampled, self.config.subcentres)
        margin: TargetMargin = self.margin
        negatives: Negatives | None = None
        if self.config.interclass_filter:
            negatives = InterclassFilter(self.config.interclass_filter)
        if self.adaface is not None:
            margin = self.adaface(_length(batch), valid_N)
        if self.curricular is not None:
            with torch.no_grad():
                cosine_N, _ = target_cosines(batch.x_ND, self.weight, target_N, self.config.subcentres)
            negatives = self.curricular(cosine_N, margin_N, target_N >= 0, margin, valid_N, self.group)
        loss_N = streaming_margin_softmax(
            batch.x_ND,
            self.weight,
            target_N,
            margin_N,
            self.settings,
            self.group,
            margin=margin,
            sampled=sampled,
            negatives=negatives,
        )
        if self.magface is not None:
            # Every rank adds the whole of it, and ranks' gradients are summed.
            length_N = ScaleGradient.apply(_length(batch), 1 / group_size(self.group))  # type: ignore[no-untyped-call]
            loss_N = loss_N + self.config.length_weight * self.magface.regulariser(length_N)
        return torch.where(valid_N, loss_N, 0).sum() / valid_N.sum().clamp_min(1)

    def _margins(
        self, batch: GatheredBatch, target_N: Tensor, class_margins_C: Tensor | None, row_margins_N: Tensor | None
    ) -> Tensor:
        if row_margins_N is not None:
            margin_N = row_margins_N
        elif class_margins_C is None:
            margin_N = torch.full_like(batch.x_ND[:, 0], self.config.margin)
        elif class_margins_C.shape != (self.shard.size,):
            raise ValueError(
                f"class_margins_C: expected one margin for each of this shard's {self.shard.size} classes, "
                f"got shape {tuple(class_margins_C.shape)}"
            )
        elif self.shard.size == 0:
            margin_N = torch.zeros_like(batch.x_ND[:, 0])
        else:
            margin_N = class_margins_C[target_N.clamp_min(0)]
        margin_N = margin_N.to(batch.x_ND.dtype)
        if self.magface is not None:
            margin_N = self.magface.margin(_length(batch)) + (margin_N - self.config.margin)
        return margin_N


def _settle_centres(head: nn.Module, *_: Any) -> None:
    """What is saved has missed no step."""
    assert isinstance(head, PartialFCHead)
    settle(head.weight)


def _magface(config: HeadConfig) -> MagFace:
    return MagFace(
        length_low=config.length_low,
        length_high=config.length_high,
        margin_low=config.margin_low,
        margin_high=config.margin_high,
    )


def _length(batch: GatheredBatch) -> Tensor:
    if batch.length_N is None:
        raise ValueError("this loss reads the embeddings' lengths: make the batch with PartialFCHead.gather")
    return batch.length_N
