"""The streaming margin softmax as GPU kernels: what they are given, when they can run, and how they are called.

They do what `partial_fc.softmax` and `partial_fc.optim` do tile by tile. `kernel_forward` sums exp(logit) and collects
the embeddings' gradient; `kernel_gradient` makes the centres' gradient, a chunk of classes at a time, and
`kernel_update` writes it, or applies the optimizer's step to centres and state in place. Cosines and exponentials
never leave the chip; besides the weight, one chunk of the classes is held: its unit centres and its gradient.

This file does not import Triton, and importing it needs none: ask `why_not` before calling the rest.

Formulas, for row n and class c that is not n's target: cos = x_n . w_c / |w_c|; logit = scale value(cos), e =
exp(logit - shift). A class whose turn it is as target has e = 0: its term is the caller's, beside the kernels.

Legend: N rows of the global batch, D embedding size, C centres of this shard, S of them that take part.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from partial_fc.kernel_terms import AdamW, CosineGradient, Sgd, Terms, interpreted
from partial_fc.negatives import HardNegatives, InterclassFilter, Negatives

__all__ = ["AdamW", "CosineGradient", "Sgd", "Terms", "forward", "gradient", "interpreted", "update", "why_not"]

MAX_DIM = 512
"""An accumulator of 64 rows and this many columns takes half of a GPU core's registers."""
MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 products."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(x_ND: Tensor, w_CD: Tensor, *, subcentres: int = 1, negatives: Negatives | None = None) -> str:
    """Why the kernels cannot take these tensors, in words; empty when they can."""
    return next(_obstacles(x_ND, w_CD, subcentres, negatives), "")


def _obstacles(x_ND: Tensor, w_CD: Tensor, subcentres: int, negatives: Negatives | None) -> Iterator[str]:
    if not _installed():
        yield "triton is not installed"
    if subcentres != 1:
        yield "sub-centres"
    if not (negatives is None or isinstance(negatives, InterclassFilter | HardNegatives)):
        yield f"{type(negatives).__name__} of the other classes' cosines"
    if x_ND.dtype != torch.float32 or w_CD.dtype not in (torch.float32, torch.bfloat16):
        yield f"embeddings of {_name(x_ND.dtype)} and centres of {_name(w_CD.dtype)}"
    if w_CD.shape[1] > MAX_DIM:
        yield f"D = {w_CD.shape[1]} is more than {MAX_DIM}"
    if not w_CD.is_contiguous():
        yield "the centres' rows do not lie one after the other"
    if interpreted():
        return
    if not (x_ND.is_cuda and w_CD.is_cuda):
        yield "tensors are on the CPU (set TRITON_INTERPRET=1 to run the kernels slowly)"
    elif torch.version.hip is not None:
        yield "not an NVIDIA GPU"
    elif (capability := torch.cuda.get_device_capability(x_ND.device)) < MIN_CAPABILITY:
        yield "compute capability {}.{} of the GPU is below {}.{}".format(*capability, *MIN_CAPABILITY)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward(terms: Terms, *, want_u: bool) -> tuple[Tensor, Tensor | None]:
    """other_N = sum_c e, float32 (N,), and u_ND = sum_c e slope(cos) w_c / |w_c|, float32 (N, D), if wanted.

    scale times u_ND is the gradient of other_N in x_ND. The order of the sums depends on the shapes and on the GPU,
    not on chance. Collectives: none.
    """
    from partial_fc.kernel_forward import run  # noqa: PLC0415  needs Triton

    return run(terms, want_u=want_u)


def gradient(batches: Sequence[CosineGradient], rows_S: Tensor | None) -> Tensor:
    """Gradient of the raw centres over all batches, float32 (S, D); where nothing takes part, 0.

    rows_S: the centres that take part in any batch, as in `Terms`. Every batch's own are the same, or have padding
    where a centre takes no part in it. Collectives: none.
    """
    from partial_fc.kernel_update import gradient as run  # noqa: PLC0415  needs Triton

    return run(batches, rows_S)


def update(
    batches: Sequence[CosineGradient],
    rows_S: Tensor | None,
    rule: Sgd | AdamW,
    *,
    key: int = 0,
    first_row: int = 0,
    extra: tuple[Tensor, Tensor] | None = None,
    skip: Tensor | None = None,
) -> None:
    """Apply that gradient to the centres that take part, and to their state, in place; no other row is read or written.

    Centres and states are float32, or bfloat16 with stochastic rounding by a hash of (key, first_row + row, column),
    key being a uint32: a class is rounded alike on any number of ranks, and as by `partial_fc.rounding`. extra: int64
    rows, and gradients (rows, D) of the raw centres that are added, tangent to them as all of this project are; rows
    that take no part are left. skip: float32 scalar on the device; where it is not 0, not a bit changes. Collectives:
    none.
    """
    from partial_fc.kernel_update import update as run  # noqa: PLC0415  needs Triton

    run(batches, rows_S, rule, key=key, first_row=first_row, extra=extra, skip=skip)
