"""Whether the kernel finds the nearest centres, and a word where it is asked for and cannot."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from configs.head import Impl
from partial_fc.choice import say_once
from partial_fc.kernel_terms import interpreted
from partial_fc.kernels import MIN_CAPABILITY


def runs_kernel(impl: Impl, centres_SD: Tensor) -> bool:
    """Whether `clustering.nearest.kernel_nearest` runs: if asked for, or on GPUs under "auto", where nothing is in its
    way.

    What is in its way is said once, as a KernelFallbackWarning.
    """
    if (
        impl in ("torch", "reference")
        or centres_SD.dtype == torch.float64
        or (impl == "auto" and not centres_SD.is_cuda)
    ):
        return False
    reason = why_not(centres_SD)
    if reason:
        say_once(f"the Triton kernel cannot run: {reason}; torch runs instead")
    return not reason


def why_not(centres_SD: Tensor) -> str:
    """Why the kernel cannot run, in words; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if not centres_SD.is_cuda:
        return "tensors are on the CPU (set TRITON_INTERPRET=1 to run the kernels slowly)"
    if torch.version.hip is not None:
        return "not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(centres_SD.device)
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} of the GPU is below {}.{}".format(*capability, *MIN_CAPABILITY)
    return ""
