"""Products and sums of rows in float64, in Triton: what torch takes a dozen passes over float64 copies for, in one.

A program takes a few rows and walks through their columns. The order in which a row's products are added depends on D
alone; whole multiples of a grid are added to the sums, so that any order of those gives the same bits. Plain versions:
`clustering.nearest.float64_rows`, which tries these before it uses them. Importing this needs Triton.

Legend: q pairs of rows, or rows; D columns, c of them at a time; S rows of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.kernel_parts import on_device

_ROWS, _COLUMNS, _WARPS = 4, 128, 4
"""Of a program: a warp a row, 16 bytes a thread."""


@triton.jit(do_not_specialize=["Q"])
def _dots_kernel(
    a, row, b, other, out, Q, a_stride, b_stride, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    row_q = q if row is None else tl.load(row + q, mask=q < Q, other=0)
    other_q = tl.load(other + q, mask=q < Q, other=-1)
    sum_qc = tl.zeros([ROWS, COLUMNS], tl.float64)
    for left in range(0, D, COLUMNS):
        here_qc = (other_q >= 0)[:, None] & (left + c < D)[None, :]
        a_qc = tl.load(a + row_q[:, None] * a_stride + (left + c)[None, :], mask=here_qc, other=0)
        b_qc = tl.load(b + other_q[:, None] * b_stride + (left + c)[None, :], mask=here_qc, other=0)
        sum_qc += a_qc.to(tl.float64) * b_qc.to(tl.float64)
    tl.store(out + q, tl.sum(sum_qc, axis=1), mask=q < Q)


@triton.jit(do_not_specialize=["Q", "S"])
def _move_kernel(
    x, old, new, sums, Q, S, rounder, x_stride, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    old_q = tl.load(old + q, mask=q < Q, other=-1)
    new_q = tl.load(new + q, mask=q < Q, other=-1)
    leaves_q, enters_q = (q < Q) & (old_q >= 0) & (old_q < S), (q < Q) & (new_q >= 0) & (new_q < S)
    for left in range(0, D, COLUMNS):
        here_c = left + c < D
        x_qc = tl.load(x + q[:, None] * x_stride + (left + c)[None, :], mask=(q < Q)[:, None] & here_c[None, :])
        grid_qc = (x_qc.to(tl.float64) + rounder) - rounder
        at_c = (left + c)[None, :]
        tl.atomic_add(
            sums + old_q[:, None] * D + at_c, -grid_qc, mask=leaves_q[:, None] & here_c[None, :], sem="relaxed"
        )
        tl.atomic_add(
            sums + new_q[:, None] * D + at_c, grid_qc, mask=enters_q[:, None] & here_c[None, :], sem="relaxed"
        )


def _rows(x_XD: Tensor) -> Tensor:
    return x_XD if x_XD.stride(-1) == 1 else x_XD.contiguous()


def row_dots(a_XD: Tensor, row_q: Tensor | None, b_YD: Tensor, other_q: Tensor) -> Tensor:
    """`float64_rows.row_dots`."""
    a_XD, b_YD = _rows(a_XD), _rows(b_YD)
    out_q = torch.empty(len(other_q), dtype=torch.float64, device=a_XD.device)
    if len(out_q):
        with on_device(a_XD):
            _dots_kernel[(triton.cdiv(len(out_q), _ROWS),)](
                a_XD, row_q if row_q is None else row_q.contiguous(), b_YD, other_q.contiguous(), out_q, len(out_q),
                a_XD.stride(0), b_YD.stride(0), D=a_XD.shape[1], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
    return out_q


def move_(sums_SD: Tensor, x_qD: Tensor, old_q: Tensor, new_q: Tensor, rounder: float) -> None:
    """`float64_rows.move_`."""
    if len(x_qD):
        x_qD = _rows(x_qD)
        with on_device(x_qD):
            _move_kernel[(triton.cdiv(len(x_qD), _ROWS),)](
                x_qD, old_q.contiguous(), new_q.contiguous(), sums_SD, len(x_qD), len(sums_SD), rounder,
                x_qD.stride(0), D=x_qD.shape[1], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
