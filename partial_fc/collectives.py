"""The head's collectives, each with its gradient and its scale written down.

A training step with the sharded head runs three: one packed all-gather of (embedding, label, sample id), one
all-reduce of two floats a row inside the softmax, one reduce-scatter of the embedding gradient in backward.
All gradients are those of the global loss: nothing here multiplies by the world size, and the backbone's own
gradients must therefore be *summed* over ranks, not averaged (`training.distributed` sees to that).

Legend: B rows of one rank, W ranks, N = W x B rows of all ranks in rank order, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; older builds on a GPU host may only know the former names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_META_FLOATS = 4  # label and sample id, int64 each, travel as raw bits in two float32 columns each


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; 1 for None, this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True, slots=True)
class GatheredBatch:
    """The batch of all ranks, as every rank sees it after the packed gather."""

    x_ND: Tensor
    """float32 unit embeddings; autograd leads back to this rank's rows by one reduce-scatter."""
    labels_N: Tensor
    """int64 class of each row; -1 marks a row that every loss ignores."""
    sample_ids_N: Tensor
    """int64 sample id of each row."""
    group: dist.ProcessGroup | None


class _PackedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, meta_B2: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        world_size = dist.get_world_size(group)
        B, D = x_BD.shape
        packed_BP = torch.cat([x_BD, meta_B2.view(torch.float32)], dim=1)
        packed_NP = packed_BP.new_empty(world_size * B, D + _META_FLOATS)
        _all_gather(packed_NP, packed_BP, group=group)
        meta_N2 = packed_NP[:, D:].contiguous().view(torch.int64)
        ctx.mark_non_differentiable(meta_N2)
        return packed_NP[:, :D].contiguous(), meta_N2

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        world_size = dist.get_world_size(ctx.group)
        grad_BD = grad_ND.new_empty(grad_ND.shape[0] // world_size, grad_ND.shape[1])
        _reduce_scatter(grad_BD, grad_ND.contiguous(), group=ctx.group)
        return grad_BD, None, None


def gather_batch(
    x_BD: Tensor, labels_B: Tensor, sample_ids_B: Tensor, group: dist.ProcessGroup | None
) -> GatheredBatch:
    """Every rank's rows on every rank, by one all-gather; backward runs one reduce-scatter (sum).

    x_BD: float32 unit embeddings. labels_B, sample_ids_B: int64. B must be the same on all ranks. Through
    backward, rank r receives sum over ranks q of dL_q/dx_r, which is the gradient of the global loss when
    every rank computes its own classes' share of it. group: None for this process alone.
    Raises TypeError or ValueError when dtypes or shapes are not as said.
    """
    if x_BD.dtype != torch.float32 or labels_B.dtype != torch.int64 or sample_ids_B.dtype != torch.int64:
        raise TypeError(
            "gather_batch expects float32 embeddings and int64 labels and sample ids, "
            f"got {x_BD.dtype}, {labels_B.dtype}, {sample_ids_B.dtype}"
        )
    if x_BD.dim() != 2 or labels_B.shape != x_BD.shape[:1] or sample_ids_B.shape != x_BD.shape[:1]:
        raise ValueError(
            "gather_batch expects shapes (B, D), (B,), (B,), "
            f"got {tuple(x_BD.shape)}, {tuple(labels_B.shape)}, {tuple(sample_ids_B.shape)}"
        )
    if group is None or group_size(group) == 1:
        return GatheredBatch(x_BD, labels_B, sample_ids_B, group)
    meta_B2 = torch.stack([labels_B, sample_ids_B], dim=1)
    x_ND, meta_N2 = _PackedGather.apply(x_BD, meta_B2, group)  # type: ignore[no-untyped-call]
    return GatheredBatch(x_ND, meta_N2[:, 0].contiguous(), meta_N2[:, 1].contiguous(), group)


def extremes(value: int, group: dist.ProcessGroup | None, device: torch.device) -> tuple[int, int]:
    """The smallest and the largest of all ranks' values. One all-reduce, on `device`; waits for it."""
    both = all_reduce_(torch.tensor([value, -value], device=device), group, dist.ReduceOp.MAX).tolist()
    return -both[1], both[0]


def all_reduce_(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce `tensor` over the group in place and return it. One all-reduce, none on one rank; no autograd."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
