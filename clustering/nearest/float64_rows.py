"""Products and sums of rows in float64, whose bits do not depend on what else is computed with them.

Products of float32 numbers are exact in float64, so what is left of a dot product is rounding of 1e-16 a sum; its order
depends on D alone. On GPUs by `clustering.nearest.kernel_float64_rows` where that runs, and by torch elsewhere.

Legend: X, Y rows of two matrices, D columns, q pairs of rows, or rows; S rows of the sums.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from clustering.nearest.choice import why_not
from partial_fc.choice import say_once

_AT_ONCE_ON_GPU = 1 << 16
_AT_ONCE = 256
"""Rows of float64 that stay in a CPU core's cache."""
_TRIAL = (300, 40, 20)
"""Rows, columns, and rows of the sums."""


def row_dots(a_XD: Tensor, row_q: Tensor | None, b_YD: Tensor, other_q: Tensor) -> Tensor:
    """Dot products a[row_q] . b[other_q], float64 (q,); all rows of a in order if row_q is None; 0 if other_q is -1.

    Indices are int64, rows of any dtype. A pair has the same bits whatever other pairs there are.
    """
    if not a_XD.is_cuda:
        return _dots_on_cpu(a_XD, row_q, b_YD, other_q)
    kernels = _kernels(a_XD.device)
    return (folded_dots if kernels is None else kernels.row_dots)(a_XD, row_q, b_YD, other_q)


def move_(sums_SD: Tensor, x_qD: Tensor, old_q: Tensor, new_q: Tensor, rounder: float) -> None:
    """Round rows to a grid, take them from the sums of `old_q` and add them to those of `new_q`, in place.

    sums_SD: float64, whole multiples of the grid, and small enough that sums of these are exact. old_q, new_q: int64;
    a sum that is not there, none. rounder: what rounds a number to the grid when it is added and taken off again.
    """
    kernels = _kernels(x_qD.device) if x_qD.is_cuda else None
    (add_moved_ if kernels is None else kernels.move_)(sums_SD, x_qD, old_q, new_q, rounder)


def _dots_on_cpu(a_XD: Tensor, row_q: Tensor | None, b_YD: Tensor, other_q: Tensor) -> Tensor:
    parts = []
    for start in range(0, len(other_q), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        a_qD = a_XD[part] if row_q is None else a_XD.index_select(0, row_q[part])
        b_qD = b_YD.index_select(0, other_q[part].clamp_min(0))
        parts.append((a_qD.double() * b_qD).sum(1).masked_fill_(other_q[part] < 0, 0))  # row by row on CPUs
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def folded_dots(a_XD: Tensor, row_q: Tensor | None, b_YD: Tensor, other_q: Tensor) -> Tensor:
    """`row_dots` by torch on any device, in an order that D alone decides: a GPU's own sum may cut few rows otherwise
    than many.
    """
    row_q = torch.arange(len(a_XD), device=a_XD.device) if row_q is None else row_q
    parts = zip(row_q.split(_AT_ONCE_ON_GPU), other_q.split(_AT_ONCE_ON_GPU), strict=True)
    dots = [_folded(a_XD[row_p].double() * b_YD[other_p.clamp_min(0)]) for row_p, other_p in parts]
    return torch.cat(dots).masked_fill_(other_q < 0, 0)


def _folded(values_qD: Tensor) -> Tensor:
    while (D := values_qD.shape[1]) > 1:
        half = D // 2
        folded = values_qD[:, :half] + values_qD[:, half : 2 * half]
        values_qD = torch.cat([folded, values_qD[:, 2 * half :]], dim=1) if D % 2 else folded
    return values_qD[:, 0]


def add_moved_(sums_SD: Tensor, x_qD: Tensor, old_q: Tensor, new_q: Tensor, rounder: float) -> None:
    """`move_` by torch."""
    grid_qD = x_qD.double().add_(rounder).sub_(rounder)
    for row_q, sign in ((old_q, -1), (new_q, 1)):
        takes_part_q = (row_q >= 0) & (row_q < len(sums_SD))
        if bool(takes_part_q.all()):
            sums_SD.index_add_(0, row_q, grid_qD, alpha=sign)
        elif bool(takes_part_q.any()):
            sums_SD.index_add_(0, row_q[takes_part_q], grid_qD[takes_part_q], alpha=sign)


def prepare(device: torch.device) -> None:
    """Compile and try the kernels now, if that is a GPU, and not when they are first needed."""
    if device.type == "cuda":
        _kernels(device)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """`clustering.nearest.kernel_float64_rows`, if it runs on that GPU and passes its trial; said once if not."""
    reason = why_not(torch.empty(0, device=device))
    if not reason:
        try:
            from clustering.nearest import kernel_float64_rows as kernels  # noqa: PLC0415  needs Triton

            reason = trial(kernels, device)
        except Exception as error:  # a compiler may fail in any way, and torch can do the same
            reason = f"{type(error).__name__}: {error}"
    if reason:
        say_once(f"the kernels for rows in float64 cannot run: {reason}; torch runs instead, more slowly")
        return None
    return kernels


def trial(kernels: ModuleType, device: torch.device) -> str:
    """What the kernels do otherwise than torch on a small problem; empty: nothing."""
    (q, D, S), generator = _TRIAL, torch.Generator().manual_seed(0)
    x_qD = torch.nn.functional.normalize(torch.randn(q, D, generator=generator)).to(device)
    old_q, new_q = (torch.randint(-1, S + 1, (q,), generator=generator).to(device) for _ in range(2))
    pairs = (
        x_qD,
        torch.arange(q, device=device).flip(0),
        x_qD,
        torch.randint(0, q, (q,), generator=generator).to(device),
    )
    off = float((kernels.row_dots(*pairs) - folded_dots(*pairs)).abs().max())
    sums_SD, expected_SD = (torch.zeros(S, D, dtype=torch.float64, device=device) for _ in range(2))
    kernels.move_(sums_SD, x_qD, old_q, new_q, 1.5 * 2.0**12)
    add_moved_(expected_SD, x_qD, old_q, new_q, 1.5 * 2.0**12)
    said = [] if off < 1e-14 else [f"a dot product is off by {off:.1e}"]
    return ", ".join(said + ([] if torch.equal(sums_SD, expected_SD) else ["sums differ"]))
