"""The gradient kernel: sum over n of g_cn x_n, with g_cn the gradient in a cosine, for every class of a chunk.

A program takes a tile of the chunk's unit centres, walks over the batch's rows, recomputes the cosines of the two, and
keeps its centres' sums in registers.

Legend: as in `kernel_parts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.kernel_parts import Chunks, exponentials, operand, product_arguments, tile_rows
from partial_fc.kernel_terms import CosineGradient
from partial_fc.kernel_tuning import Launch, fastest, scratch


@triton.jit(do_not_specialize=["N", "S", "C", "start"])
def _gradient_kernel(
    x, unit, rows, target, psi, t, by, at_target, sums, N, S, C, start, scale2, shift2, threshold,
    NEGATIVES: tl.constexpr, PRODUCT: tl.constexpr, ADD: tl.constexpr, E: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    place_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_c, real_c = tile_rows(rows, start + place_c, S, C)
    d = tl.arange(0, E)
    at_cE = place_c[:, None] * E + d
    unit_cE = tl.load(unit + at_cE)
    t_value = 0.0
    if NEGATIVES == "hard":
        t_value = tl.load(t)

    sums_cE = tl.zeros([BLOCK_C, E], tl.float32)
    for block in range(0, N, BLOCK_N):
        n = block + tl.arange(0, BLOCK_N)
        x_nE = tl.load(x + n.to(tl.int64)[:, None] * E + d)
        target_n = tl.load(target + n, mask=n < N, other=-1)
        by_n = tl.load(by + n, mask=n < N, other=0.0)  # so rows beyond N, of zeros, add nothing
        at_target_n = tl.load(at_target + n, mask=n < N, other=0.0)
        psi_n = 0.0
        if NEGATIVES == "hard":
            psi_n = tl.load(psi + n, mask=n < N, other=0.0)[None, :]
        cosine_cn = tl.dot(unit_cE, tl.trans(x_nE), input_precision="ieee")
        hidden_c = (real_c == 0)[:, None]
        _, sloped_cn = exponentials(cosine_cn, hidden_c, psi_n, t_value, threshold, scale2, shift2, NEGATIVES)
        g_cn = tl.where(row_c[:, None] == target_n[None, :], at_target_n[None, :], by_n[None, :] * sloped_cn)
        sums_cE = tl.dot(operand(g_cn, PRODUCT), x_nE, sums_cE, input_precision="ieee")
    if ADD:
        sums_cE += tl.load(sums + at_cE)
    tl.store(sums + at_cE, sums_cE)


def chunk_sums(batches: Sequence[CosineGradient], rows_S: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """For each chunk: first and last place among rows_S, that one not counted, and the sums (c, E) over all batches.

    The sums are float32, in one tensor that the next chunk takes again.
    """
    first = batches[0].terms

    def prepare() -> Callable[[Launch], object]:
        trial_batch = dataclasses.replace(batches[0], terms=scratch(first))
        return lambda launch: list(_launch([trial_batch], trial_batch.terms.rows_S, launch))

    yield from _launch(batches, rows_S, fastest("gradient", first, prepare))


def _launch(
    batches: Sequence[CosineGradient], rows_S: Tensor | None, launch: Launch
) -> Iterator[tuple[int, int, Tensor]]:
    arguments = [
        product_arguments(batch.terms)
        | {"by": batch.by_N.float().contiguous(), "at_target": batch.at_target_N.float().contiguous()}
        for batch in batches
    ]
    chunks = Chunks(batches[0].terms.w_CD, rows_S, arguments[0])
    sums_cE = torch.empty_like(chunks.unit_cE, dtype=torch.float32)
    for start, stop in chunks:
        for number, of_batch in enumerate(arguments):
            _gradient_kernel[(-(-(stop - start) // launch.kept),)](
                unit=chunks.unit_cE,
                start=start,
                sums=sums_cE,
                ADD=number > 0,
                BLOCK_C=launch.kept,
                BLOCK_N=launch.walked,
                num_warps=launch.warps,
                num_stages=launch.stages,
                **of_batch,
            )
        yield start, stop, sums_cE
