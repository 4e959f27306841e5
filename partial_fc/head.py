"""The Partial FC head: this rank's class centres, and the margin softmax over the centres of all ranks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import HeadConfig
from partial_fc.collectives import GatheredBatch, group_rank, group_size
from partial_fc.margins import target_margin
from partial_fc.sampling import sample_rows
from partial_fc.softmax import SoftmaxSettings, streaming_margin_softmax
from sharding import shard_of

_INIT_BLOCK = 4096  # classes that share one generator, so that a centre's start does not depend on the ranks
_INIT_STD = 0.01


def initial_centres(start: int, stop: int, dim: int, seed: int) -> Tensor:
    """Normal(0, 0.01) rows for classes [start, stop): a pure function of (seed, class), float32 (stop-start, D)."""
    parts = [torch.empty(0, dim)]
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        # The CPU generator takes 32 bits of its seed only: hash seed and block into them.
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0]))
        rows = torch.randn(_INIT_BLOCK, dim, generator=generator) * _INIT_STD
        first = block * _INIT_BLOCK
        parts.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(parts)


class HeadStateError(ValueError):
    """Saved class centres do not fit this head."""


class PartialFCHead(nn.Module):
    """Margin softmax over `num_classes` classes whose centres are split over the ranks of `group`.

    weight: float32 (C_local, D), the centres of `self.shard`; any number of classes and ranks, a rank may own
    none. Its gradient is exact and needs no further reduction. With sample_rate < 1 it is sparse, unless told
    otherwise: use it with the optimizers of `partial_fc.optim`.
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
        self.weight = nn.Parameter(initial_centres(self.shard.start, self.shard.stop, embedding_size, seed))
        self.settings = SoftmaxSettings(
            scale=config.scale,
            num_classes=num_classes,
            margin=target_margin(config.loss, m1=config.m1, m3=config.m3, straight_through=config.straight_through),
            interclass_filter=config.interclass_filter,
            product_dtype=product_dtype,
            sparse_gradient=sparse_gradient,
        )

    def get_extra_state(self) -> dict[str, int]:
        """What the weight alone does not say: how it is cut."""
        return {
            "num_classes": self.num_classes,
            "world_size": group_size(self.group),
            "rank": group_rank(self.group),
        }

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Raises HeadStateError when the state is of another number of classes or ranks, or of another rank."""
        for name, mine in self.get_extra_state().items():
            if state[name] != mine:
                raise HeadStateError(
                    f"class centres were saved with {name} = {state[name]}, this head has {mine}: load them with the "
                    "same classes, ranks and order of ranks"
                )

    def local_rows(self, labels_N: Tensor) -> Tensor:
        """Row of this shard that holds each label's centre, -1 where another rank owns it or the label is -1."""
        mine_N = (labels_N >= self.shard.start) & (labels_N < self.shard.stop)
        return torch.where(mine_N, labels_N - self.shard.start, -1)

    def forward(
        self,
        batch: GatheredBatch,
        *,
        step: int,
        class_margins_C: Tensor | None = None,
        row_margins_N: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over the rows of the global batch that have a label: a scalar, the same on all ranks.

        class_margins_C: float32 (C_local,), a margin for each class of this shard. row_margins_N: float32 (N,),
        a margin for each row instead, read on the rank that owns the row's class. Neither: `config.margin`.
        step: seeds the sampling, which draws the same classes for any number of ranks. Collectives: one all-reduce
        of 2N floats in forward, none in backward.
        """
        target_N = self.local_rows(batch.labels_N)
        if row_margins_N is None:
            if class_margins_C is None:
                row_margins_N = torch.full_like(batch.x_ND[:, 0], self.config.margin)
            elif class_margins_C.shape != (self.shard.size,):
                raise ValueError(
                    f"class_margins_C: expected one margin for each of this shard's {self.shard.size} classes, "
                    f"got shape {tuple(class_margins_C.shape)}"
                )
            elif self.shard.size == 0:
                row_margins_N = torch.zeros_like(batch.x_ND[:, 0])
            else:
                row_margins_N = class_margins_C[target_N.clamp_min(0)]
        rows_S: Tensor | None = None
        if self.config.sample_rate < 1 and self.shard.size:
            rows_S = sample_rows(
                target_N, self.shard, self.num_classes, self.config.sample_rate, seed=self.seed, step=step
            )
            target_N = torch.where(target_N >= 0, torch.searchsorted(rows_S, target_N), target_N)
        loss_N = streaming_margin_softmax(
            batch.x_ND, self.weight, target_N, row_margins_N, self.settings, self.group, rows_S
        )
        valid_N = batch.labels_N >= 0
        return torch.where(valid_N, loss_N, 0).sum() / valid_N.sum().clamp_min(1)
