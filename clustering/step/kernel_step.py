"""What a training step does for each row of its batch, in Triton: a kernel each in place of some fifty calls of torch.

A step's own arithmetic here is nothing to a GPU; what costs is to launch it. A program that changes what it reads is
one warp and takes one row, so that what it reads is read before it writes. Plain versions: `clustering.step.plain`; the
losses': `clustering.step.kernel_losses`; which of them run: `clustering.step.choice`.

Importing this needs Triton.

Legend: N rows of the global batch, j other rows; D embedding size, E the next power of two; K clusters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clustering.step.plain import BankRows, Moving
from partial_fc.kernel_parts import on_device

LOOKED_AT: tl.constexpr = tl.constexpr(128)
"""Rows that a program compares with its own at a time."""
_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
_BLOCK = 128


def width(dim: int) -> int:
    """E."""
    return max(16, 1 << (dim - 1).bit_length())


@triton.jit
def _finite(x_d):
    return tl.sum((tl.abs(x_d) < float("inf")).to(tl.int32), axis=0) == x_d.shape[0]  # false for nan


@triton.jit
def _unit_or(values_d, otherwise_d):
    """`clustering.service.shards.unit_or` of one row."""
    length = tl.sqrt_rn(tl.sum(values_d * values_d, axis=0))
    return tl.where(length > _TINY, tl.div_rn(values_d, tl.maximum(length, _TINY)), otherwise_d)


@triton.jit
def _comes_before(ids, labels, sample, n):
    """How many labelled rows before n show the same sample."""
    before = 0
    for start in range(0, n, LOOKED_AT):
        j = start + tl.arange(0, LOOKED_AT)
        same_j = (tl.load(ids + j, mask=j < n, other=-1) == sample) & (tl.load(labels + j, mask=j < n, other=-1) >= 0)
        before += tl.sum(same_j.to(tl.int32), axis=0)
    return before


@triton.jit(do_not_specialize=["samples"])
def _store_kernel(
    x, ids, labels, slots, bank, seen, samples, momentum, MOMENTUM: tl.constexpr, D: tl.constexpr, E: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, E)
    x_d = tl.load(x + n * D + d, mask=d < D, other=0.0)
    sample = tl.load(ids + n)
    known = (tl.load(labels + n) >= 0) & (sample >= 0) & (sample < samples)
    slot = tl.load(slots + sample, mask=known, other=-1).to(tl.int64)
    if (slot >= 0) & _finite(x_d) & (_comes_before(ids, labels, sample, tl.program_id(0)) == 0):
        if MOMENTUM:
            old_d = tl.load(bank + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
            before = tl.load(seen + slot)
            x_d = tl.where(before != 0, _unit_or(x_d + momentum * (old_d - x_d), x_d), x_d)
        tl.store(bank + slot * D + d, x_d.to(bank.dtype.element_ty), mask=d < D)
        tl.store(seen + slot, 1)


@triton.jit(do_not_specialize=["N", "samples"])
def _codes_kernel(ids, labels, code, cluster, suspect, N, samples, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample_n = tl.load(ids + n, mask=n < N, other=-1)
    known_n = (tl.load(labels + n, mask=n < N, other=-1) >= 0) & (sample_n >= 0) & (sample_n < samples)
    code_n = tl.load(code + sample_n, mask=known_n, other=0).to(tl.int64)
    tl.store(cluster + n, tl.abs(code_n) - 1, mask=n < N)
    tl.store(suspect + n, code_n < 0, mask=n < N)


@triton.jit
def _earlier(x, cluster, suspect, k, n, D: tl.constexpr, E: tl.constexpr):
    """1 if a row before n counts in cluster k, whose program moves it then; else 0."""
    d = tl.arange(0, E)
    found = 0
    for start in range(0, n, LOOKED_AT):
        j = start + tl.arange(0, LOOKED_AT)
        same_j = tl.load(cluster + j, mask=j < n, other=-1) == k
        if (found == 0) & (tl.max(same_j.to(tl.int32), axis=0) > 0):
            for other in range(start, tl.minimum(start + LOOKED_AT, n)):
                if (found == 0) & (tl.load(cluster + other) == k) & (tl.load(suspect + other) == 0):
                    x_d = tl.load(x + tl.cast(other, tl.int64) * D + d, mask=d < D, other=0.0)
                    found += tl.cast(_finite(x_d), tl.int32)
    return found


@triton.jit
def _move_row(rows, place, count, mean_d, momentum, new, D: tl.constexpr, E: tl.constexpr):
    """Towards the mean, if it is one of the rows here."""
    d = tl.arange(0, E)
    if (place >= 0) & (place < count):
        old_d = tl.load(rows + place * D + d, mask=d < D, other=0.0)
        moved_d = _unit_or(momentum * old_d + new * mean_d, old_d)
        tl.store(rows + place * D + d, moved_d, mask=d < D)


@triton.jit(do_not_specialize=["N", "first_cluster", "S", "first_class", "R"])
def _move_kernel(
    x, cluster, suspect, class_of, centres, anchors, N, first_cluster, S, first_class, R, momentum, new,
    D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    d = tl.arange(0, E)
    k = tl.load(cluster + n)
    if (k >= 0) & (tl.load(suspect + n) == 0):
        total_d = tl.load(x + tl.cast(n, tl.int64) * D + d, mask=d < D, other=0.0)
        if _finite(total_d) & (_earlier(x, cluster, suspect, k, n, D, E) == 0):
            count = 1
            for start in range(n + 1, N, LOOKED_AT):
                j = start + tl.arange(0, LOOKED_AT)
                same_j = tl.load(cluster + j, mask=j < N, other=-1) == k
                if tl.max(same_j.to(tl.int32), axis=0) > 0:
                    for other in range(start, tl.minimum(start + LOOKED_AT, N)):
                        if (tl.load(cluster + other) == k) & (tl.load(suspect + other) == 0):
                            x_d = tl.load(x + tl.cast(other, tl.int64) * D + d, mask=d < D, other=0.0)
                            if _finite(x_d):
                                total_d += x_d
                                count += 1
            mean_d = tl.div_rn(total_d, tl.zeros([E], tl.float32) + tl.cast(count, tl.float32))
            _move_row(centres, k - first_cluster, S, mean_d, momentum, new, D, E)
            matched = tl.load(class_of + k)
            if matched >= 0:
                _move_row(anchors, matched - first_class, R, mean_d, momentum, new, D, E)


def store(bank: BankRows, x_ND: Tensor, ids_N: Tensor, labels_N: Tensor, momentum: float) -> None:
    """`step_plain.store`."""
    N, D = x_ND.shape
    if not N:
        return
    with on_device(x_ND):
        _store_kernel[(N,)](
            x_ND.contiguous(), ids_N.contiguous(), labels_N.contiguous(), bank.slot_of_sample, bank.x_XD,
            bank.seen_X.view(torch.uint8), len(bank.slot_of_sample), momentum, MOMENTUM=momentum > 0,
            D=D, E=width(D), num_warps=1,
        )  # fmt: skip


def codes(code_I: Tensor, ids_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """`step_plain.codes`."""
    N = len(ids_N)
    cluster_N = torch.empty(N, dtype=torch.int64, device=ids_N.device)
    suspect_N = torch.empty(N, dtype=torch.bool, device=ids_N.device)
    if N:
        with on_device(ids_N):
            _codes_kernel[(triton.cdiv(N, _BLOCK),)](
                ids_N.contiguous(),
                labels_N.contiguous(),
                code_I,
                cluster_N,
                suspect_N.view(torch.uint8),
                N,
                len(code_I),
                BLOCK=_BLOCK,
            )
    return cluster_N, suspect_N


def move(moving: Moving, x_ND: Tensor, cluster_N: Tensor, suspect_N: Tensor, momentum: float) -> None:
    """`step_plain.move`."""
    m = moving
    N, D = x_ND.shape
    if not N:
        return
    with on_device(x_ND):
        _move_kernel[(N,)](
            x_ND.contiguous(), cluster_N, suspect_N.view(torch.uint8), m.class_K, m.c_SD, m.anchor_RD, N,
            m.first_cluster, len(m.c_SD), m.first_class, len(m.anchor_RD), momentum, 1 - momentum,
            D=D, E=width(D), num_warps=1,
        )  # fmt: skip
