"""Matrix products with operands of reduced precision and float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, operands rounded to `dtype`, summed in float32 (float64 operands stay what they are)."""
    with torch.autocast(a.device.type, enabled=False):  # around it, the caller's would round operands and result
        return _product(a, b, dtype)


def add_product_(out: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, keep: float = 1.0) -> Tensor:
    """keep * out + a @ b, in place."""
    with torch.autocast(a.device.type, enabled=False):
        if dtype == torch.float32 or a.dtype == torch.float64:
            return out.addmm_(a, b, beta=keep)  # the sum is taken while the product is written
        if keep == 0:
            return out.copy_(_product(a, b, dtype))  # whatever was there, nan too
        return out.mul_(keep).add_(_product(a, b, dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 or a.dtype == torch.float64:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return a.to(dtype).float() @ b.to(dtype).float()  # the same rounding where no such kernel exists
