"""Whether the kernel finds the nearest centres, and a word where it is asked for and cannot."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from configs.head import Impl
from partial_fc.choice import KernelFallbackWarning
from partial_fc.kernels import why_not


def runs_kernels(impl: Impl, centres_SD: Tensor, product_dtype: torch.dtype) -> bool:
    """Whether the Triton kernel runs: where it is asked for, or on GPUs under "auto", and nothing stands against it.

    What stands against it is said once, as a KernelFallbackWarning.
    """
    if impl in ("torch", "reference") or (impl == "auto" and not centres_SD.is_cuda):
        return False
    reason = why_not(centres_SD, centres_SD)
    if reason:
        _say_once(reason)
    return not reason


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"the Triton kernel cannot run: {reason}; torch runs instead", KernelFallbackWarning, 2)
