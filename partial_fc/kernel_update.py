"""What becomes of the centres' gradient: it is written, or a step of the optimizer is made of it, rows at a time.

As cosines do not change with a centre's length, what lies along the centre is taken out of the sums first:
d_c = (G_c - (G_c . w_c) / |w_c|^2 w_c) / |w_c|, with G_c = sum_n g_cn x_n. A chunk's sums come from the L2 cache,
mostly; a centre and its state are read and written once.

Legend: as in `kernel_parts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.kernel_gradient import chunk_sums
from partial_fc.kernel_parts import MIN_NORM, ROW_BLOCK, ROW_WARPS, length, on_device, tile_rows
from partial_fc.kernel_terms import AdamW, CosineGradient, Sgd


@triton.jit
def _lowbias32(h):
    """Hash of uint32s (Wellons, "Prospecting for hash functions", 2018: lowbias32)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _store(pointer, values, mask, random16):
    """To float32, or to bfloat16 by stochastic rounding: random16, in [0, 2^16), is added below the bits that stay."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000  # a GPU's has all bits set: it would carry over into -0
        bits = tl.where(nan, 0x7FC0, (bits + random16) >> 16)
        values = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointer, values, mask=mask)


@triton.jit
def _tangent(v_cE, w_cE, length_c):
    """v without its part along w."""
    along_c = tl.div_rn(tl.div_rn(tl.sum(v_cE * w_cE, axis=1), length_c), length_c)
    return v_cE - along_c[:, None] * w_cE


@triton.jit
def _one_minus_power(steps, log_beta):
    """1 - beta^steps. A power near 1 has lost the digits wanted: there, by the series of exp."""
    y = steps * log_beta
    series = 1.0 + y / 9
    for i in tl.static_range(8, 1, -1):
        series = 1.0 + y / i * series
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@triton.jit(do_not_specialize=["start", "S", "C", "key", "first_row"])
def _step_kernel(
    w, rows, sums, grad, first_state, second_state, row_steps, skip, start, S, C, key, first_row,
    lr, decay, beta1, beta2, new1, new2, log_beta1, log_beta2, eps,
    RULE: tl.constexpr, ON_SPHERE: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_c, real_c = tile_rows(rows, start + place_c, S, C)
    if skip is not None:
        real_c = real_c & (tl.load(skip + tl.zeros_like(place_c)) == 0.0)  # or no row takes part
    d = tl.arange(0, E)
    mask_cE = real_c[:, None] & (d < D)
    at_cE = row_c[:, None] * D + d
    w_cE = tl.load(w + at_cE, mask=mask_cE, other=0.0).to(tl.float32)
    sums_cE = tl.load(sums + place_c[:, None] * E + d)
    length_c = tl.maximum(length(w_cE), MIN_NORM)
    d_cE = tl.div_rn(_tangent(sums_cE, w_cE, length_c), length_c[:, None])
    if RULE == "gradient":
        at_grad_cE = (start + place_c).to(tl.int64)[:, None] * D + d
        tl.store(grad + at_grad_cE, d_cE, mask=(start + place_c < S)[:, None] & (d < D))
    else:
        random_c = _lowbias32((row_c + first_row).to(tl.uint32) ^ key.to(tl.uint32))
        random_cE = _lowbias32(random_c[:, None] + d.to(tl.uint32) * 0x9E3779B9)
        first_cE = tl.load(first_state + at_cE, mask=mask_cE, other=0.0).to(tl.float32)
        if RULE == "sgd":
            if ON_SPHERE:
                first_cE = beta1 * _tangent(first_cE, w_cE, length_c) + d_cE
            else:
                first_cE = beta1 * first_cE + d_cE + decay * w_cE
            new_cE = w_cE - lr * first_cE
        else:
            steps_c = tl.load(row_steps + row_c, mask=real_c, other=0.0) + 1.0
            second_cE = tl.load(second_state + at_cE, mask=mask_cE, other=0.0).to(tl.float32)
            first_cE = beta1 * first_cE + new1 * d_cE
            second_cE = beta2 * second_cE + new2 * d_cE * d_cE
            mean_cE = tl.div_rn(first_cE, _one_minus_power(steps_c, log_beta1)[:, None])
            square_cE = tl.div_rn(second_cE, _one_minus_power(steps_c, log_beta2)[:, None])
            step_cE = lr * tl.div_rn(mean_cE, tl.sqrt_rn(square_cE) + eps)
            new_cE = w_cE - _tangent(step_cE, w_cE, length_c) if ON_SPHERE else w_cE * (1.0 - lr * decay) - step_cE
            tl.debug_barrier()  # several warps hold a row: all have read its steps before one of them writes
            tl.store(row_steps + row_c, steps_c, mask=real_c)
            _store(second_state + at_cE, second_cE, mask_cE, _lowbias32(random_cE ^ 0x5BD1E995) & 0xFFFF)
        if ON_SPHERE:
            new_cE = new_cE * tl.div_rn(length(w_cE), tl.maximum(length(new_cE), MIN_NORM))[:, None]
        _store(first_state + at_cE, first_cE, mask_cE, random_cE >> 16)
        _store(w + at_cE, new_cE, mask_cE, random_cE & 0xFFFF)


@triton.jit(do_not_specialize=["start", "stop"])
def _extra_kernel(w, row, place, values, sums, start, stop, D: tl.constexpr, E: tl.constexpr):
    """Rows of another loss's gradient to the chunk's sums. These are of unit centres' gradients: the step divides by
    the length again."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.load(place + r)
    if (at >= start) & (at < stop):
        d = tl.arange(0, E)
        w_d = tl.load(w + tl.load(row + r) * D + d, mask=d < D, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(w_d * w_d, axis=0)), MIN_NORM)
        values_d = tl.load(values + r * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.atomic_add(sums + (at - start) * E + d, values_d * norm, mask=d < D, sem="relaxed")


_NUMBERS = ("lr", "decay", "beta1", "beta2", "new1", "new2", "log_beta1", "log_beta2", "eps")


def _rule_arguments(rule: Sgd | AdamW | None) -> dict[str, Any]:
    """Arguments of the step, by name. None: the gradient is written."""
    found: dict[str, Any] = dict.fromkeys(_NUMBERS, 0.0) | {"RULE": "gradient", "ON_SPHERE": False}
    found |= dict.fromkeys(("grad", "first_state", "second_state", "row_steps", "skip"))
    if rule is None:
        return found
    found |= {"lr": float(rule.lr), "decay": float(rule.decay), "ON_SPHERE": rule.on_sphere}
    if isinstance(rule, Sgd):
        return found | {"RULE": "sgd", "first_state": rule.velocity_CD, "beta1": float(rule.momentum)}
    found |= {"RULE": "adamw", "first_state": rule.mean_CD, "second_state": rule.square_CD}
    found |= {"row_steps": rule.row_steps_C1, "eps": float(rule.eps)}
    for name, beta in zip("12", rule.betas, strict=True):
        # In float64 here: 1 - 0.999 has lost three digits in float32.
        found |= {f"beta{name}": float(beta), f"new{name}": 1.0 - beta}
        found[f"log_beta{name}"] = math.log(beta) if beta else -math.inf
    return found


def _walk(
    batches: Sequence[CosineGradient],
    rows_S: Tensor | None,
    arguments: dict[str, Any],
    extra: tuple[Tensor, Tensor] | None = None,
) -> None:
    w_CD = batches[0].terms.w_CD.detach()
    C, D = w_CD.shape
    S = C if rows_S is None else len(rows_S)
    if S == 0:
        return
    row_R, values_RD = (None, None) if extra is None else (extra[0].contiguous(), extra[1].contiguous())
    place_R = None if row_R is None else _places(row_R, rows_S)
    with on_device(w_CD):
        for start, stop, sums_cE in chunk_sums(batches, rows_S):
            if row_R is not None and len(row_R):
                _extra_kernel[(len(row_R),)](
                    w_CD, row_R, place_R, values_RD, sums_cE, start, stop, D=D, E=sums_cE.shape[1], num_warps=1
                )
            _step_kernel[(triton.cdiv(stop - start, ROW_BLOCK),)](
                w=w_CD,
                rows=rows_S,
                sums=sums_cE,
                start=start,
                S=S,
                C=C,
                D=D,
                E=sums_cE.shape[1],
                BLOCK=ROW_BLOCK,
                num_warps=ROW_WARPS,
                **arguments,
            )


def _places(row_R: Tensor, rows_S: Tensor | None) -> Tensor:
    """Of rows of the weight among those that take part, int64 (R,); -1 for one that does not."""
    if rows_S is None:
        return row_R
    place_R = torch.searchsorted(rows_S, row_R).clamp_max(len(rows_S) - 1)
    return torch.where(rows_S[place_R] == row_R, place_R, -1)


def gradient(batches: Sequence[CosineGradient], rows_S: Tensor | None) -> Tensor:
    """`kernels.gradient`."""
    w_CD = batches[0].terms.w_CD
    grad_SD = torch.empty(
        len(w_CD) if rows_S is None else len(rows_S), w_CD.shape[1], dtype=torch.float32, device=w_CD.device
    )
    _walk(batches, rows_S, _rule_arguments(None) | {"grad": grad_SD, "key": 0, "first_row": 0})
    return grad_SD


def update(
    batches: Sequence[CosineGradient],
    rows_S: Tensor | None,
    rule: Sgd | AdamW,
    *,
    key: int,
    first_row: int,
    extra: tuple[Tensor, Tensor] | None,
    skip: Tensor | None,
) -> None:
    """`kernels.update`."""
    signed_key = key - (1 << 32) if key >= 1 << 31 else key  # of one type for Triton, whatever its value
    _walk(batches, rows_S, _rule_arguments(rule) | {"key": signed_key, "first_row": first_row, "skip": skip}, extra)
