"""What the kernels share. Importing this needs Triton; `partial_fc.kernels` is the way in.

Classes come in chunks. A chunk's centres are gathered, normalised and rounded to what the products take, into a scratch
tensor that stays in the GPU's L2 cache while a kernel of products reads it over and over; a larger one where that is
but a few times.

Legend: N rows of the batch and n of one block; C centres, S that take part, c of one chunk or tile; D columns, E the
next power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.kernel_terms import Terms, interpreted
from partial_fc.negatives import HardNegatives, InterclassFilter

MIN_NORM: tl.constexpr = tl.constexpr(1e-12)
BLOCK_MULTIPLE = 128
"""Every block size of a kernel of products divides it."""
ROW_BLOCK, ROW_WARPS = (64, 1) if interpreted() else (8, 8)
"""Rows and warps of a program that only walks through memory. On a GPU, 16 numbers of a tensor a thread when D is 512;
the interpreter takes about as long for a program of any size."""
_CHUNK_BYTES = 32 << 20
"""Of an H100's 50 MB of L2 cache."""
_FEW_READS = 8
"""A chunk that is read less often need not stay there: it is larger, as every chunk's sums go to memory and back."""


@triton.jit
def tile_rows(rows, place_c, S, C):
    """Rows (c,) of the weight at places among the classes that take part, and which of them are there at all."""
    row_c = place_c.to(tl.int64) if rows is None else tl.load(rows + place_c, mask=place_c < S, other=C)
    return row_c, (place_c < S) & (row_c < C)


@triton.jit
def operand(values, PRODUCT: tl.constexpr):
    """What a product takes of float32 values."""
    rounded = values.to(tl.bfloat16 if PRODUCT == "bfloat16" else tl.float32)
    if PRODUCT == "emulated":  # Triton's interpreter takes bfloat16 operands for integers: round, and stay in float32
        bits = rounded.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = bits.to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def exponentials(cosine, hidden, psi, t, threshold, scale2, shift2, NEGATIVES: tl.constexpr):
    """e = exp(scale value - shift), and e times the value's slope; both 0 where hidden. scale2, shift2: over ln 2."""
    value = cosine
    if NEGATIVES == "filter":
        value = tl.where(cosine > threshold, 0.0, cosine)
    if NEGATIVES == "hard":
        value = tl.where(cosine > psi, cosine * (t + cosine), cosine)
    e = tl.where(hidden, 0.0, tl.exp2(value * scale2 - shift2))
    sloped = e
    if NEGATIVES == "filter":
        sloped = tl.where(cosine > threshold, 0.0, e)
    if NEGATIVES == "hard":
        sloped = tl.where(cosine > psi, e * (t + 2 * cosine), e)
    return e, sloped


@triton.jit
def length(values_cD):
    """Of each row, (c,)."""
    return tl.sqrt_rn(tl.sum(values_cD * values_cD, axis=1))


@triton.jit(do_not_specialize=["start", "S", "C"])
def _unit_kernel(
    w, rows, unit, start, S, C, PRODUCT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_c, real_c = tile_rows(rows, start + place_c, S, C)
    d = tl.arange(0, E)
    w_cE = tl.load(w + row_c[:, None] * D + d, mask=real_c[:, None] & (d < D), other=0.0).to(tl.float32)
    unit_cE = tl.div_rn(w_cE, tl.maximum(length(w_cE), MIN_NORM)[:, None])
    tl.store(unit + place_c[:, None] * E + d, operand(unit_cE, PRODUCT))


def product_arguments(terms: Terms) -> dict[str, Any]:
    """Arguments of both kernels of products, by name. x is padded with zeros, to (a multiple of BLOCK_MULTIPLE, E)."""
    negatives = terms.negatives
    hard = negatives if isinstance(negatives, HardNegatives) else None
    N, D = terms.x_ND.shape
    E = max(16, triton.next_power_of_2(D))
    x_ND, product = terms.x_ND.detach().to(terms.product_dtype), str(terms.product_dtype).removeprefix("torch.")
    if interpreted() and product == "bfloat16":
        x_ND, product = x_ND.float(), "emulated"
    return {
        "x": torch.nn.functional.pad(x_ND, (0, E - D, 0, -N % BLOCK_MULTIPLE)).contiguous(),
        "rows": terms.rows_S,
        "target": terms.target_N,
        "psi": None if hard is None else hard.psi_N.float().contiguous(),
        "t": None if hard is None else hard.t.float(),
        "N": N,
        "S": terms.size,
        "C": len(terms.w_CD),
        "scale2": terms.scale / math.log(2),
        "shift2": terms.shift / math.log(2),
        "threshold": float(negatives.threshold) if isinstance(negatives, InterclassFilter) else 0.0,
        "NEGATIVES": "filter" if isinstance(negatives, InterclassFilter) else "plain" if hard is None else "hard",
        "PRODUCT": product,
        "E": E,
    }


def larger(reads: int) -> int:
    """How many times larger a chunk is that is read so often."""
    return max(1, _FEW_READS // max(1, reads))


class Chunks:
    """Walks over the classes that take part, chunk by chunk."""

    def __init__(self, w_CD: Tensor, rows_S: Tensor | None, arguments: dict[str, Any], reads: int = _FEW_READS) -> None:
        """arguments: of `product_arguments`, for any batch. reads: how often the kernel reads a chunk."""
        x_NE = arguments["x"]
        self.total = len(w_CD) if rows_S is None else len(rows_S)
        fitting = larger(reads) * _CHUNK_BYTES // (x_NE.shape[1] * x_NE.element_size())
        self.size = min(fitting, -(-self.total // BLOCK_MULTIPLE) * BLOCK_MULTIPLE)
        """Classes of a chunk, a multiple of BLOCK_MULTIPLE."""
        self.unit_cE = x_NE.new_empty(self.size, x_NE.shape[1])
        """The chunk's unit centres, as the products take them; zeros where there is no class."""
        self._arguments = {name: arguments[name] for name in ("C", "PRODUCT", "E")}
        self._arguments |= {"w": w_CD.detach(), "rows": rows_S, "unit": self.unit_cE, "D": w_CD.shape[1]}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First and last place, that one not counted, of each chunk, when `unit_cE` holds its centres."""
        for start in range(0, self.total, self.size):
            stop = min(start + self.size, self.total)
            filled = -(-(stop - start) // BLOCK_MULTIPLE) * BLOCK_MULTIPLE  # as far as a block may reach
            grid = (filled // ROW_BLOCK,)
            _unit_kernel[grid](start=start, S=self.total, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS, **self._arguments)
            yield start, stop


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
