"""What the Triton kernels are given: a batch's logits, its gradient, the optimizer's step.

Formulas and legend: `partial_fc.kernels`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.negatives import Negatives


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What the other classes' logits are made of, for one batch."""

    x_ND: Tensor
    """float32, unit rows."""
    w_CD: Tensor
    """float32 or bfloat16, raw centres of any length, the rows one after the other in memory."""
    target_N: Tensor
    """int64, each row's target as a row of w_CD; -1 when it is elsewhere."""
    rows_S: Tensor | None = None
    """int64, the centres that take part, distinct; entries of C are padding. None: all."""
    owner_C: Tensor | None = None
    """int64, the target that each centre belongs to, for forward alone and without rows_S; from `owners` on: it takes
    no part. None: each centre is a target of its own."""
    owners: int = 0
    scale: float
    shift: float
    """Taken from every logit: the caller sees to it that no exponential or sum leaves float32."""
    negatives: Negatives | None = None
    product_dtype: torch.dtype = torch.float32
    """Operands of the products, bfloat16 or float32; sums are float32 whatever it is."""

    @property
    def size(self) -> int:
        """S, padding counted."""
        return len(self.w_CD) if self.rows_S is None else len(self.rows_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sgd:
    """v = momentum v + d + decay w; w = w - lr v.

    on_sphere: of v only what is tangent to the sphere at w is kept before d comes to it, there is no decay, and w gets
    its old length back.
    """

    velocity_CD: Tensor
    lr: float
    momentum: float
    decay: float = 0.0
    on_sphere: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """k = k + 1; m = b1 m + (1 - b1) d; q = b2 q + (1 - b2) d^2;
    p = lr (m / (1 - b1^k)) / (sqrt(q / (1 - b2^k)) + eps); w = (1 - lr decay) w - p.

    arXiv 1711.05101, with a count of steps for every row.

    on_sphere: of p only what is tangent to the sphere at w is taken, there is no decay, and w gets its old length back.
    """

    mean_CD: Tensor
    square_CD: Tensor
    row_steps_C1: Tensor
    """float32."""
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float = 0.0
    on_sphere: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineGradient:
    """What makes one batch's gradient of the centres."""

    terms: Terms
    by_N: Tensor
    """float32: e and the value's slope times this is the gradient in another class's cosine."""
    at_target_N: Tensor
    """float32: the gradient in the target's cosine."""


def interpreted() -> bool:
    """Whether Triton runs kernels as Python, on CPU tensors too, slowly: its own switch, read when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
