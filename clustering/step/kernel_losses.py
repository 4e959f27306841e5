"""The cluster losses' arithmetic by rows, in Triton: see `clustering.step.kernel_step`, whose rules hold here too.

Importing this needs Triton.

Legend: N rows of the global batch, D embedding size, E the next power of two, S columns of this rank, R classes of this
rank, M sub-centres of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clustering.step import plain
from clustering.step.kernel_step import LOOKED_AT, width
from clustering.step.plain import NOBODY, Columns
from partial_fc import kernel_forward
from partial_fc.kernel_parts import MIN_NORM, on_device
from partial_fc.kernel_terms import Terms
from partial_fc.kernels import MAX_DIM

_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["S"])
def _own_kernel(x, labels, owned, order, centres, weight, own, u, S, temperature, D: tl.constexpr, E: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, E)
    y = tl.load(labels + n)
    u_d = tl.zeros([E], tl.float32)
    total = 0.0
    if y >= 0:
        x_d = tl.div_rn(tl.load(x + n * D + d, mask=d < D, other=0.0), tl.zeros([E], tl.float32) + temperature)
        low, high = 0, S
        while low < high:  # the first column of the class
            middle = (low + high) // 2
            if tl.load(owned + middle) < y:
                low = middle + 1
            else:
                high = middle
        going = tl.load(owned + low, mask=low < S, other=-1) == y
        while going:
            column = tl.load(order + low)
            c_d = tl.load(centres + column * D + d, mask=d < D, other=0.0)
            e = tl.exp(tl.sum(x_d * c_d, axis=0)) * tl.load(weight + column)
            total += e
            u_d += e * c_d
            low += 1
            going = tl.load(owned + low, mask=low < S, other=-1) == y
    tl.store(own + n, total)
    tl.store(u + n * D + d, u_d, mask=d < D)


@triton.jit
def _join_kernel(
    own, other, taken, count, u_own, u_other, loss, gradient, temperature, D: tl.constexpr, E: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, E)
    p, o = tl.load(own + n), tl.load(other + n)
    value = 0.0
    g_d = tl.zeros([E], tl.float32)
    if (tl.load(taken + n) != 0) & (p > 0):
        rows = tl.maximum(tl.load(count), 1).to(tl.float32)
        odds = tl.log(o) - tl.log(p)
        small = tl.exp(-tl.abs(odds))
        value = (tl.maximum(odds, 0.0) + tl.log(1.0 + small)) / rows
        chance = tl.where(odds >= 0, 1.0, small) / (1.0 + small)
        share = 1.0 / (temperature * rows)
        u_other_d = tl.load(u_other + n * D + d, mask=d < D, other=0.0)
        u_own_d = tl.load(u_own + n * D + d, mask=d < D, other=0.0)
        g_d = u_other_d * (share / tl.maximum(p + o, _TINY)) - u_own_d * (share * chance / p)
    tl.store(loss + n, value)
    tl.store(gradient + n * D + d, g_d, mask=d < D)


@triton.jit(do_not_specialize=["N", "first_class", "R"])
def _align_kernel(
    labels, w, anchor, f, distinct, gap, row, gradient, N, first_class, R, M: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    d = tl.arange(0, E)
    y = tl.load(labels + n)
    before = 0
    for start in range(0, n, LOOKED_AT):
        j = start + tl.arange(0, LOOKED_AT)
        before += tl.sum((tl.load(labels + j, mask=j < n, other=-1) == y).to(tl.int32), axis=0)
    first = (y >= 0) & (before == 0)
    r = y - first_class
    value = 0.0
    best_row = (y * 0 - 1).to(tl.int64)
    g_d = tl.zeros([E], tl.float32)
    if first & (r >= 0) & (r < R):
        a_d = tl.load(anchor + r * D + d, mask=d < D, other=0.0)
        best = -2.0
        for m in tl.static_range(M):
            w_d = tl.load(w + (r * M + m) * D + d, mask=d < D, other=0.0).to(tl.float32)
            length = tl.maximum(tl.sqrt_rn(tl.sum(w_d * w_d, axis=0)), MIN_NORM)
            unit_d = tl.div_rn(w_d, tl.zeros([E], tl.float32) + length)
            cosine = tl.sum(unit_d * a_d, axis=0)
            better = cosine > best
            g_d = tl.where(better, tl.div_rn(cosine * unit_d - a_d, tl.zeros([E], tl.float32) + length), g_d)
            best_row = tl.where(better, r * M + m, best_row)
            best = tl.where(better, cosine, best)
        weight = tl.load(f + r)
        value = weight * (1.0 - best)
        g_d = weight * g_d
    tl.store(distinct + n, first)
    tl.store(gap + n, value)
    tl.store(row + n, best_row)
    tl.store(gradient + n.to(tl.int64) * D + d, g_d, mask=d < D)


def own(columns: Columns, x_ND: Tensor, labels_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`step_plain.own`."""
    c = columns
    N, D = x_ND.shape
    own_N, u_ND = torch.empty(N, device=x_ND.device), torch.empty(N, D, device=x_ND.device)
    if N:
        with on_device(x_ND):
            _own_kernel[(N,)](
                x_ND.contiguous(), labels_N.contiguous(), c.owned_S, c.order_S, c.c_SD, c.weight_S, own_N, u_ND,
                len(c.owned_S), temperature, D=D, E=width(D), num_warps=1,
            )  # fmt: skip
    return own_N, u_ND


def others(
    columns: Columns, x_ND: Tensor, labels_N: Tensor, temperature: float, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`step_plain.others`, by the head's kernel: exponentials stay in registers. Not for rows that are too long for it,
    nor for float32 operands, which GPUs multiply faster in large products.
    """
    if product_dtype == torch.float32 or x_ND.shape[1] > MAX_DIM:
        return plain.others(columns, x_ND, labels_N, temperature, product_dtype)
    terms = Terms(
        x_ND=x_ND,
        w_CD=columns.c_SD,
        target_N=labels_N.contiguous(),
        owner_C=columns.owner_S,
        owners=NOBODY,
        scale=1 / temperature,
        shift=0.0,
        product_dtype=product_dtype,
    )
    other_N, u_ND = kernel_forward.run(terms, want_u=True)
    assert u_ND is not None
    return other_N, u_ND


def join(
    own_N: Tensor, other_N: Tensor, taken_N: Tensor, u_own_ND: Tensor, u_other_ND: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`step_plain.join`."""
    N, D = u_own_ND.shape
    loss_N, gradient_ND = torch.empty(N, device=own_N.device), torch.empty(N, D, device=own_N.device)
    if N:
        with on_device(own_N):
            _join_kernel[(N,)](
                own_N.contiguous(), other_N.contiguous(), taken_N.view(torch.uint8), taken_N.sum(), u_own_ND,
                u_other_ND, loss_N, gradient_ND,
                temperature, D=D, E=width(D), num_warps=1,
            )  # fmt: skip
    return loss_N.sum(), gradient_ND


def align(
    labels_N: Tensor, weight_XD: Tensor, anchor_RD: Tensor, f_R: Tensor, first_class: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`step_plain.align`."""
    N, D, R = len(labels_N), weight_XD.shape[1], len(anchor_RD)
    device = weight_XD.device
    distinct_N = torch.empty(N, dtype=torch.bool, device=device)
    gap_N, row_N = torch.empty(N, device=device), torch.empty(N, dtype=torch.int64, device=device)
    gradient_ND = torch.empty(N, D, device=device)
    with on_device(weight_XD):
        _align_kernel[(N,)](
            labels_N.contiguous(), weight_XD.contiguous(), anchor_RD, f_R, distinct_N.view(torch.uint8), gap_N,
            row_N, gradient_ND, N, first_class, R, M=len(weight_XD) // R, D=D, E=width(D), num_warps=1,
        )  # fmt: skip
    count = distinct_N.sum().clamp_min(1)
    return gap_N.sum() / count, torch.where(row_N < 0, row_N.amax().clamp_min(0), row_N), gradient_ND.div_(count)
