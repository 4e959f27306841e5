"""Supervised contrastive loss between embeddings and cluster centres, streamed. Ours, see docs/method.md.

    loss_i = -log( P / (P + O) ) = log1p(O / P)
    P = sum over the clusters k that class y_i owns of w_k exp(z c_k / tau)      O = the same over all others, w = 1

A class that k-means splits owns several clusters: any of them may explain the sample, and none is a negative.
Cosines are bounded, so exp() stays below exp(1/tau) and needs no pass for a maximum. The gradient

    d loss_i / dz = U_O / (P + O) - (U_P / P) (O / (P + O)),    U = sum of the same terms times c_k / tau

is emitted by the forward pass: U_O and U_P are collected beside O and P, and nothing is left for backward.
O takes tiles (N, s), one at a time, whatever the number of clusters. P takes the few clusters of each row's class.

Legend: N rows of the global batch, D embedding size, S candidate clusters of this rank, s of them in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.step.choice import step_ops
from clustering.step.plain import TILE_NUMBERS, Columns, first_of_each
from partial_fc.collectives import GatheredBatch, all_reduce_, refuse_second_derivative
from partial_fc.products import product


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Clusters of this rank that take part in the loss."""

    owner_S: Tensor
    """int64: the class that owns the cluster; -1: it takes no part."""
    columns: Columns
    """Unit centres get no gradient; weights sum to 1 over the clusters of a class, on all ranks together."""

    @classmethod
    def build(cls, *, cluster_S: Tensor, c_SD: Tensor, owner_S: Tensor, weight_S: Tensor) -> Candidates:
        """Columns of the clusters `cluster_S` (int64); a cluster that comes again takes no part a second time."""
        owner_S = torch.where(first_of_each(cluster_S), owner_S, -1)
        owned_S, order_S = owner_S.sort(stable=True)
        counts_X = torch.unique_consecutive(owned_S[owned_S >= 0], return_counts=True)[1]
        most = int(counts_X.max()) if len(counts_X) else 0
        columns = Columns(c_SD=c_SD, weight_S=weight_S, owned_S=owned_S, order_S=order_S, most=most)
        return cls(owner_S=owner_S, columns=columns)


class _StreamingContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        labels_N: Tensor,
        taken_N: Tensor,
        candidates: Candidates,
        temperature: float,
        product_dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> Tensor:
        N = x_ND.shape[0]
        sums_2N = x_ND.new_zeros(2, N)
        own_N, other_N = sums_2N
        ops, c_SD = step_ops(x_ND), candidates.columns.c_SD
        own_here_N, u_own_ND = ops.own(candidates.columns, x_ND, labels_N, temperature)
        own_N += own_here_N
        u_other_ND = torch.zeros_like(x_ND, memory_format=torch.contiguous_format)
        step = max(64, TILE_NUMBERS[x_ND.device.type] // max(N, 1))
        for c_sD, owner_s in zip(c_SD.split(step), candidates.owner_S.split(step), strict=True):
            operand_sD = c_sD if product_dtype == torch.float32 else c_sD.to(product_dtype)
            e_Ns = product(x_ND / temperature, operand_sD.T, product_dtype).exp_()
            e_Ns.masked_fill_((owner_s < 0) | (owner_s == labels_N[:, None]), 0)
            other_N += e_Ns.sum(1)
            u_other_ND += product(e_Ns, operand_sD, product_dtype)
        all_reduce_(sums_2N, group)
        loss, dx_ND = ops.join(own_N, other_N, taken_N, u_own_ND, u_other_ND, temperature)
        ctx.save_for_backward(dx_ND)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (dx_ND,) = ctx.saved_tensors
        return grad * dx_ND, None, None, None, None, None, None


def contrastive_loss(
    batch: GatheredBatch,
    candidates: Candidates,
    suspect_N: Tensor,
    *,
    temperature: float,
    product_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """L_scc: mean of loss_i over the rows that take part; a scalar, the same on all ranks, 0 when none does.

    Rows that are suspect (bool (N,)) or have label -1 take no part; a row whose class owns no candidate adds 0.
    temperature: tau, above 0.02 so that exp(1 / tau) fits float32. product_dtype: operands of the matrix products.
    Backward gives x_ND this rank's candidates' share of the gradient (sum over ranks to get all of it). Forward
    runs one all-reduce of 2N floats, backward none; no host sync.
    """
    taken_N = (batch.labels_N >= 0) & ~suspect_N
    loss: Tensor = _StreamingContrast.apply(  # type: ignore[no-untyped-call]
        batch.x_ND, batch.labels_N, taken_N, candidates, temperature, product_dtype, batch.group
    )
    return loss
