"""The head's collectives, each with its gradient and its scale written down.

A training step with the sharded head runs three: one packed all-gather of (embedding, its length, label, sample id),
one all-reduce of two float64 a row inside the softmax (CurricularFace: one more before it), one reduce-scatter of the
embedding gradient in backward. With a bf16 wire the first and the last carry half the bytes; the last is then an
all-to-all of the parts, summed in float32 where they arrive, as a reduce-scatter in bf16 would round at every hop.
All gradients are those of the global loss: nothing here multiplies by the world size, and the backbone's own
gradients must therefore be *summed* over ranks, not averaged (`training.distributed` sees to that).

Legend: B rows of one rank, W ranks, N = W x B rows of all ranks in rank order, D embedding size, Q bytes of a packed
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; older builds on a GPU host may only know the former names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; 1 for None, this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def refuse_second_derivative() -> None:
    """Called in a backward pass that autograd must not differentiate again: it would silently leave terms out."""
    if torch.is_grad_enabled():
        raise RuntimeError("the head has no second derivative: backward with create_graph=True cannot go through it")


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
    length_N: Tensor | None = None
    """float32 length of each embedding before it was made a unit one; autograd leads back with x_ND's gradient."""


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors (B, ...) side by side as bytes (B, Q)."""
    columns = [part[:, None] if part.dim() == 1 else part for part in parts]
    return torch.cat([part.contiguous().view(torch.uint8) for part in columns], dim=1)


def _unpacked(packed_NQ: Tensor, *kinds: tuple[int, torch.dtype]) -> list[Tensor]:
    """Tensors (N, columns) of the (columns, dtype) given, in the order of packing."""
    parts, start = [], 0
    for columns, dtype in kinds:
        stop = start + columns * dtype.itemsize
        # Cloned, so that every part begins at an address that its dtype can be read from.
        parts.append(packed_NQ[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype))
        start = stop
    return parts


class _PackedGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, length_B: Tensor, meta_B2: Tensor, group: dist.ProcessGroup, wire: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group, ctx.wire = group, wire
        B, D = x_BD.shape
        packed_BQ = _packed([x_BD.to(wire), length_B, meta_B2])
        packed_NQ = packed_BQ.new_empty(dist.get_world_size(group) * B, packed_BQ.shape[1])
        _all_gather(packed_NQ, packed_BQ, group=group)
        x_ND, length_N1, meta_N2 = _unpacked(packed_NQ, (D, wire), (1, torch.float32), (2, torch.int64))
        ctx.mark_non_differentiable(meta_N2)
        return x_ND.float(), length_N1[:, 0], meta_N2

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        W, D = dist.get_world_size(ctx.group), grad_ND.shape[1]
        B = grad_ND.shape[0] // W
        if ctx.wire == torch.float32:
            grad_NE = torch.cat([grad_ND, grad_N[:, None]], dim=1)
            grad_BE = grad_NE.new_empty(B, D + 1)
            _reduce_scatter(grad_BE, grad_NE, group=ctx.group)
            return grad_BE[:, :D], grad_BE[:, D], None, None, None
        packed_NQ = _packed([grad_ND.to(ctx.wire), grad_N])
        parts_NQ = torch.empty_like(packed_NQ)
        dist.all_to_all_single(parts_NQ, packed_NQ, group=ctx.group)
        parts_ND, parts_N1 = _unpacked(parts_NQ, (D, ctx.wire), (1, torch.float32))
        return parts_ND.float().view(W, B, D).sum(0), parts_N1.view(W, B).sum(0), None, None, None


def gather_batch(
    x_BD: Tensor,
    labels_B: Tensor,
    sample_ids_B: Tensor,
    group: dist.ProcessGroup | None,
    *,
    length_B: Tensor | None = None,
    wire_dtype: torch.dtype = torch.float32,
) -> GatheredBatch:
    """Every rank's rows on every rank, by one all-gather; backward runs one reduce-scatter (sum).

    x_BD: float32 unit embeddings. labels_B, sample_ids_B: int64. B must be the same on all ranks. length_B: float32,
    the embeddings' lengths, for losses that read them. wire_dtype: bfloat16 halves the bytes of embeddings and of their
    gradients; x_ND then holds rounded ones, on one rank too, and backward runs an all-to-all in the
    reduce-scatter's place. Through backward, rank r receives sum over ranks q of dL_q/dx_r, which is the gradient of
    the global loss when every rank computes its own classes' share of it. group: None for this process alone.
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
        return GatheredBatch(x_BD.to(wire_dtype).float(), labels_B, sample_ids_B, group, length_B)
    meta_B2 = torch.stack([labels_B, sample_ids_B], dim=1)
    known_B = x_BD.new_zeros(len(x_BD)) if length_B is None else length_B
    gathered = _PackedGather.apply(x_BD, known_B, meta_B2, group, wire_dtype)  # type: ignore[no-untyped-call]
    x_ND, length_N, meta_N2 = gathered
    return GatheredBatch(
        x_ND,
        meta_N2[:, 0].contiguous(),
        meta_N2[:, 1].contiguous(),
        group,
        None if length_B is None else length_N,
    )


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


class SumOverRanks(torch.autograd.Function):
    """A sum over ranks. Backward leaves each rank the gradient of its own part. One all-reduce in forward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return all_reduce_(part.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
