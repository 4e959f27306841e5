"""Supervised contrastive loss between embeddings and cluster centres, streamed. Ours, see docs/method.md.

    loss_i = -log( P / (P + O) ) = log1p(O / P)
    P = sum over the clusters k that class y_i owns of w_k exp(z c_k / tau)      O = the same over all others, w = 1

A class that k-means splits owns several clusters: any of them may explain the sample, and none is a negative.
Cosines are bounded, so exp() stays below exp(1/tau) and needs no pass for a maximum. The gradient

    d loss_i / dz = U_O / (P + O) - (U_P / P) (O / (P + O)),    U = sum of the same terms times c_k / tau

is emitted by the forward pass: U_O and U_P are collected beside O and P, and nothing is left for backward.
O takes no more than tiles (N, s), one at a time, whatever the number of clusters; in bf16 on GPUs they stay in
registers. P takes the few clusters of each row's class.

Legend: N rows of the global batch, D embedding size, S columns of this rank (clusters, and means of classes without
one), s of them in a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.step.choice import step_ops
from clustering.step.plain import Columns
from partial_fc.collectives import GatheredBatch, all_reduce_, refuse_second_derivative


class _StreamingContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        labels_N: Tensor,
        taken_N: Tensor,
        columns: Columns,
        temperature: float,
        product_dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ops = step_ops(x_ND)
        own_N, u_own_ND = ops.own(columns, x_ND, labels_N, temperature)
        other_N, u_other_ND = ops.others(columns, x_ND, labels_N, temperature, product_dtype)
        own_N, other_N = all_reduce_(torch.stack([own_N, other_N]), group)
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
    columns: Columns,
    suspect_N: Tensor,
    *,
    temperature: float,
    product_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """L_scc: mean of loss_i over the rows that take part; a scalar, the same on all ranks, 0 when none does.

    Rows that are suspect (bool (N,)) or have label -1 take no part; a row whose class owns no column adds 0.
    temperature: tau, above 0.02 so that exp(1 / tau) fits float32. product_dtype: operands of the matrix products.
    Backward gives x_ND this rank's columns' share of the gradient (sum over ranks to get all of it). Forward
    runs one all-reduce of 2N floats, backward none; no host sync.
    """
    taken_N = (batch.labels_N >= 0) & ~suspect_N
    loss: Tensor = _StreamingContrast.apply(  # type: ignore[no-untyped-call]
        batch.x_ND, batch.labels_N, taken_N, columns, temperature, product_dtype, batch.group
    )
    return loss
