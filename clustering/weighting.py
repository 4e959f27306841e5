"""Rows that count for more or less in the gradient of the features, and alike in everything else.

Legend: N rows of the global batch, D embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_N: Tensor) -> Tensor:
        ctx.save_for_backward(weight_N)
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (weight_N,) = ctx.saved_tensors
        return grad_ND * weight_N[:, None], None


def weighted_gradient(x_ND: Tensor, weight_N: Tensor) -> Tensor:
    """x_ND itself, bit for bit; its gradient is weight_N (float32 (N,)) times that of the result. No collective."""
    weighted: Tensor = _Weighted.apply(x_ND, weight_N)  # type: ignore[no-untyped-call]
    return weighted
