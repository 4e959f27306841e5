"""The forward kernel: sums of exponentials and the embeddings' unnormalised gradient.

A program takes a block of rows and a split of a chunk, keeps its rows' sums in registers, walks over the split's tiles,
and at the end adds the sums to its split's, in memory. These are added up after the last chunk. All orders are fixed.

Short sums also help: tensor cores cut off where others round, and so lose up to n 2^-23 of a sum in n additions, of 16
classes each (Fasi et al., PeerJ CS 7:e330, 2021).

Legend: as in `kernel_parts`; P splits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.kernel_parts import (
    BLOCK_MULTIPLE,
    Chunks,
    exponentials,
    larger,
    on_device,
    operand,
    product_arguments,
    tile_rows,
)
from partial_fc.kernel_terms import Terms
from partial_fc.kernel_tuning import Launch, fastest, scratch


@triton.jit(do_not_specialize=["N", "S", "C", "start", "stop", "split_size"])
def _forward_kernel(
    x, unit, rows, target, psi, t, other, u, N, S, C, start, stop, split_size, scale2, shift2, threshold,
    NEGATIVES: tl.constexpr, PRODUCT: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, E)
    x_nE = tl.load(x + n.to(tl.int64)[:, None] * E + d)
    target_n = tl.load(target + n, mask=n < N, other=-1)
    psi_n, t_value = 0.0, 0.0
    if NEGATIVES == "hard":
        psi_n = tl.load(psi + n, mask=n < N, other=0.0)[:, None]
        t_value = tl.load(t)

    other_n = tl.zeros([BLOCK_N], tl.float32)
    u_nE = tl.zeros([BLOCK_N, E], tl.float32)
    first = start + tl.program_id(1) * split_size
    for tile in range(first, tl.minimum(first + split_size, stop), BLOCK_C):
        c = tile + tl.arange(0, BLOCK_C)
        row_c, real_c = tile_rows(rows, c, S, C)
        unit_cE = tl.load(unit + (c - start)[:, None] * E + d)
        cosine_nc = tl.dot(x_nE, tl.trans(unit_cE), input_precision="ieee")
        hidden_nc = (row_c[None, :] == target_n[:, None]) | (real_c == 0)[None, :]
        e_nc, sloped_nc = exponentials(cosine_nc, hidden_nc, psi_n, t_value, threshold, scale2, shift2, NEGATIVES)
        other_n += tl.sum(e_nc, axis=1)
        if u is not None:
            u_nE = tl.dot(operand(sloped_nc, PRODUCT), unit_cE, u_nE, input_precision="ieee")

    at_n = tl.program_id(1).to(tl.int64) * N + n
    tl.store(other + at_n, tl.load(other + at_n, mask=n < N, other=0.0) + other_n, mask=n < N)
    if u is not None:
        at_nE = u + at_n[:, None] * E + d
        tl.store(at_nE, tl.load(at_nE, mask=(n < N)[:, None], other=0.0) + u_nE, mask=(n < N)[:, None])


def _splits(blocks: int, size: int, device: torch.device) -> int:
    """How many splits of `size` classes fill the GPU, with few partial sums: `blocks` programs run for each."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    most = max(1, min(-(-2 * cores // blocks), size // BLOCK_MULTIPLE))

    def idle(splits: int) -> float:
        """Share of the cores' time, to a tenth."""
        rounds = -(-blocks * splits // cores)
        return round(1 - blocks * splits / (rounds * cores), 1)

    return min(range(1, most + 1), key=lambda splits: (idle(splits), splits))


def _launch(terms: Terms, launch: Launch, want_u: bool) -> tuple[Tensor, Tensor | None]:
    N, D = terms.x_ND.shape
    arguments = product_arguments(terms)
    blocks = -(-N // launch.kept)
    chunks = Chunks(terms.w_CD, terms.rows_S, arguments, reads=blocks)
    if terms.owner_C is not None:
        arguments |= {"rows": terms.owner_C, "C": terms.owners}  # instead of numbers of their own
    splits = _splits(blocks, chunks.size, terms.x_ND.device)
    other_PN = terms.x_ND.new_zeros(splits, N)
    u_PNE = terms.x_ND.new_zeros(splits, N, arguments["E"]) if want_u else None
    for start, stop in chunks:
        tiles = -(-(stop - start) // launch.walked)
        _forward_kernel[(blocks, splits)](
            unit=chunks.unit_cE,
            start=start,
            stop=stop,
            other=other_PN,
            u=u_PNE,
            split_size=-(-tiles // splits) * launch.walked,
            BLOCK_N=launch.kept,
            BLOCK_C=launch.walked,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **arguments,
        )
    return other_PN.sum(0), None if u_PNE is None else u_PNE.sum(0)[:, :D].contiguous()


def run(terms: Terms, *, want_u: bool) -> tuple[Tensor, Tensor | None]:
    """`kernels.forward`."""
    N, D = terms.x_ND.shape
    if not (N and terms.size):
        return terms.x_ND.new_zeros(N), terms.x_ND.new_zeros(N, D) if want_u else None

    def prepare() -> Callable[[Launch], object]:
        trial_terms = scratch(terms, larger(-(-N // 64)))
        return lambda launch: _launch(trial_terms, launch, want_u)

    with on_device(terms.x_ND):
        return _launch(terms, fastest(("forward", want_u), terms, prepare), want_u)
