"""Whether a step's rows go through Triton's kernels or plain torch, and a trial of the kernels before they are used."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clustering.nearest.choice import why_not
from clustering.step.plain import PLAIN, StepOps
from clustering.step.trial import differences
from partial_fc.choice import say_once


def kernel_ops() -> StepOps:
    """Needs Triton."""
    from clustering.step import kernel_losses, kernel_step  # noqa: PLC0415

    return StepOps(
        store=kernel_step.store,
        codes=kernel_step.codes,
        move=kernel_step.move,
        own=kernel_losses.own,
        others=kernel_losses.others,
        join=kernel_losses.join,
        align=kernel_losses.align,
    )


def step_ops(rows_XD: Tensor) -> StepOps:
    """For rows of that size on that device: kernels on a GPU where they run and pass their trial, said once where not;
    plain torch elsewhere.
    """
    return _on_gpu(rows_XD.device, rows_XD.shape[-1]) if rows_XD.is_cuda else PLAIN


@functools.cache
def _on_gpu(device: torch.device, dim: int) -> StepOps:
    reason = why_not(torch.empty(0, device=device))
    if not reason:
        try:
            ops = kernel_ops()
            reason = trial(ops, device, dim=dim)
        except Exception as error:  # a compiler may fail in any way, and training goes on without the kernels
            reason = f"{type(error).__name__}: {error}"
    if reason:
        say_once(f"the cluster service's kernels cannot run: {reason}; torch runs instead, more slowly")
        return PLAIN
    return ops


def trial(ops: StepOps, device: torch.device, *, rows: int = 300, dim: int = 40) -> str:
    """What `ops` do otherwise than the plain functions on a small problem, in float32 and bf16; empty: nothing."""
    said = []
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2**-7)):
        found = differences(ops, PLAIN, device, rows=rows, dim=dim, seed=0, dtype=dtype)
        said += [f"{name} is off by {value:.1e} in {dtype}" for name, value in found.items() if not value < most]
    return ", ".join(said)
