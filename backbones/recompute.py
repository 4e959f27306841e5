"""Activation checkpointing: parts of a backbone keep only their input in training, backward computes the rest again.

Gradients are the same bits as without it: random numbers (stochastic depth) are drawn again from the same state, and
autocast is as it was. BatchNorm's running statistics move once, in forward: the second time it moves others, which are
thrown away (it normalises by the batch's own; one that is set to evaluation keeps its own, which do not move).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Part(NamedTuple):
    """What is computed again as a whole: a method that takes and returns tensors."""

    module: nn.Module
    method: str = "forward"


def recompute(parts: Sequence[Part], share: float) -> None:
    """Make the first `share` of the parts, rounded up, keep only what they are given.

    share: 0 to 1. The parts' methods are replaced on the modules themselves; names of weights stay. Raises ValueError
    for a share out of range, or when there is no part to take.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"recompute: expected 0 to 1, a share of the blocks, got {share}")
    if share and not parts:
        raise ValueError(f"recompute: expected 0, as this backbone has no blocks to compute again, got {share}")
    for module, method in parts[: math.ceil(share * len(parts))]:
        setattr(module, method, partial(_run, module, getattr(module, method)))


def _run(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():  # the compiler takes care of what is a side effect
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, context_fn=partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first forward, and around the one in backward."""
    return contextlib.nullcontext(), _statistics_aside(module)


@contextlib.contextmanager
def _statistics_aside(module: nn.Module) -> Iterator[None]:
    """BatchNorm has other tensors for its statistics: without any, autograd would not save as many as before."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    aside = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else torch.zeros_like(b) for name, b in norm._buffers.items()})
    try:
        yield
    finally:  # also when torch stops early, by an exception of its own
        for norm, buffers in zip(norms, aside, strict=True):
            norm._buffers.update(buffers)
