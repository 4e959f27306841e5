"""Which implementation computes the softmax, and a word where it is not the one that was asked for."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from configs.head import Impl
from partial_fc.kernels import why_not
from partial_fc.negatives import Negatives


class KernelFallbackWarning(RuntimeWarning):
    """The Triton kernels cannot run; the torch implementation does, with the same results, more slowly."""


def runs_kernels(impl: Impl, x_ND: Tensor, w_RD: Tensor, *, subcentres: int, negatives: Negatives | None) -> bool:
    """Whether the Triton kernels run: where they are asked for, or on GPUs under "auto", and nothing stands against it.

    What stands against it is said once, as a KernelFallbackWarning.
    """
    if impl == "torch" or (impl == "auto" and not w_RD.is_cuda):
        return False
    reason = why_not(x_ND, w_RD, subcentres=subcentres, negatives=negatives)
    if reason:
        say_once(f"the Triton kernels cannot run: {reason}; the torch implementation runs instead")
    return not reason


@functools.cache
def say_once(text: str) -> None:
    """A KernelFallbackWarning."""
    warnings.warn(text, KernelFallbackWarning, 2)
