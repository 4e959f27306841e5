"""Stochastic rounding to bfloat16: up or down by lot, so that small steps are not lost but come true on average.

bf16 keeps 8 bits: an update below 1/512 of a number vanishes when rounded to nearest, each time. Rounded up with the
chance of its distance to the lower neighbour, it arrives in the mean (the expected value is the number itself,
exactly). The lots are a hash of (key, row, column): the same on any number of ranks, on CPUs and GPUs, and in the
Triton kernels.

Legend: k rows of one tile, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: neighbouring columns start far apart
_SECOND = 0x5BD1E995


def _mixed(x: Tensor) -> Tensor:
    """int64 holding uint32, one to one: the hash "lowbias32" (Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def lots(row_k: Tensor, columns: int, key: int) -> Tensor:
    """uint32 in int64, (k, columns): 16 bits for one tensor, 16 for another. row_k: int64 row numbers over all
    ranks."""
    start_k1 = _mixed((row_k & _MASK) ^ (key & _MASK))[:, None]
    column_D = torch.arange(columns, device=row_k.device) * _GOLDEN
    return _mixed((start_k1 + column_D) & _MASK)


def more_lots(lots_kD: Tensor) -> Tensor:
    """Another uint32 from each."""
    return _mixed(lots_kD ^ _SECOND)


def stochastic_bf16(values_kD: Tensor, lots_kD: Tensor) -> Tensor:
    """float32 values rounded to bf16, up with the chance of their distance to the lower neighbour in magnitude.

    lots_kD: its low 16 bits are used. What is not finite stays so.
    """
    bits_kD = values_kD.contiguous().view(torch.int32)
    rounded_kD = (bits_kD + (lots_kD & 0xFFFF).to(torch.int32)) & -0x10000
    finite_kD = torch.isfinite(values_kD)
    return torch.where(finite_kD, rounded_kD.view(torch.float32), values_kD).to(torch.bfloat16)
