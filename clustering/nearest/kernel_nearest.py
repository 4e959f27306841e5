"""`nearest.top_two` as one kernel: a product of matrices that keeps of each row the two largest numbers.

A program takes a block of points and a split of the centres, and walks over the split's tiles as a product does; of
a tile, two numbers and a place a row are left, in registers. The splits' results are merged at the end. Nothing is
summed over tiles, so neither their order nor the splits change a bit.

Importing this needs Triton.

Legend: b points, n of one block; s centres, c of one tile; D embedding size, k columns at a time, P splits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from partial_fc.choice import say_once
from partial_fc.kernel_terms import interpreted
from partial_fc.kernel_tuning import timed

Find = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is cut. Powers of two from 16."""

    points: int
    centres: int
    columns: int
    warps: int
    stages: int


_INTERPRETED = Launch(32, 64, 32, 1, 1)
"""So that small tests meet several tiles and their ends."""
_LAUNCHES = {
    torch.bfloat16: (
        Launch(128, 256, 64, 8, 3),
        Launch(128, 128, 64, 8, 4),
        Launch(128, 128, 64, 4, 3),
        Launch(64, 128, 32, 4, 3),  # for GPUs with 100 kB of shared memory
    ),
    torch.float32: (Launch(64, 64, 32, 8, 2), Launch(32, 32, 32, 4, 2)),
}
_chosen: dict[tuple[object, ...], Launch] = {}
_TRIAL = (8192, 16384)  # points and centres


@triton.jit(do_not_specialize=["B", "S", "split_size"])
def _top_two_kernel(
    x, centres, hidden, first, column, second, B, S, split_size,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(n, B - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    hidden_n = tl.load(hidden + row_n)
    first_n = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second_n = tl.full([BLOCK_N], float("-inf"), tl.float32)
    column_n = tl.zeros([BLOCK_N], tl.int64)
    start = tl.program_id(1) * split_size
    stop = tl.minimum(start + split_size, S)
    for tile in range(start, stop, BLOCK_C):
        c = tile + tl.arange(0, BLOCK_C)
        row_c = tl.minimum(c, S - 1).to(tl.int64)
        cosine_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for left in range(0, D, BLOCK_K):
            here_k = left + k < D
            x_nk = tl.load(x + row_n[:, None] * D + (left + k)[None, :], mask=here_k[None, :], other=0.0)
            centre_kc = tl.load(centres + row_c[None, :] * D + (left + k)[:, None], mask=here_k[:, None], other=0.0)
            cosine_nc = tl.dot(x_nk, centre_kc, cosine_nc, input_precision="ieee")
        out_nc = (c >= stop)[None, :] | (c[None, :] == hidden_n[:, None])
        cosine_nc = tl.where(out_nc, float("-inf"), cosine_nc)
        largest_n = tl.max(cosine_nc, axis=1)
        at_n = tl.min(tl.where(cosine_nc == largest_n[:, None], c[None, :], tile + BLOCK_C), axis=1)
        next_n = tl.max(tl.where(c[None, :] == at_n[:, None], float("-inf"), cosine_nc), axis=1)
        better_n = largest_n > first_n
        second_n = tl.maximum(tl.maximum(second_n, next_n), tl.where(better_n, first_n, largest_n))
        column_n = tl.where(better_n, at_n.to(tl.int64), column_n)
        first_n = tl.where(better_n, largest_n, first_n)
    at = tl.program_id(1).to(tl.int64) * B + n
    tl.store(first + at, first_n, mask=n < B)
    tl.store(column + at, column_n, mask=n < B)
    tl.store(second + at, second_n, mask=n < B)


def _splits(blocks: int, tiles: int, device: torch.device) -> int:
    """So many that twice as many programs run as the GPU has cores, or all tiles have one."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(-(-2 * cores // blocks), tiles))


def _run(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor, launch: Launch) -> tuple[Tensor, Tensor, Tensor]:
    (b, D), s = x_bD.shape, len(operand_sD)
    blocks, tiles = -(-b // launch.points), -(-s // launch.centres)
    split_size = -(-tiles // _splits(blocks, tiles, x_bD.device)) * launch.centres
    P = -(-s // split_size)
    first_Pb, second_Pb = (torch.empty(P, b, device=x_bD.device) for _ in range(2))
    column_Pb = torch.empty(P, b, dtype=torch.int64, device=x_bD.device)
    _top_two_kernel[(blocks, P)](
        x_bD, operand_sD, hidden_b, first_Pb, column_Pb, second_Pb, b, s, split_size,
        D=D, BLOCK_N=launch.points, BLOCK_C=launch.centres, BLOCK_K=launch.columns,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    first_b = first_Pb.amax(0)
    split_b = (first_Pb == first_b).int().argmax(0)  # the first of equals
    others_Pb = first_Pb.scatter(0, split_b[None], float("-inf"))
    second_b = others_Pb.amax(0).maximum(second_Pb.amax(0))
    return first_b, column_Pb.gather(0, split_b[None])[0], second_b


def _fastest(x_bD: Tensor, operand_sD: Tensor) -> Launch:
    """Timed once for each GPU, D and dtype, on tensors of no meaning. Raises RuntimeError when none fits the GPU."""
    if interpreted():
        return _INTERPRETED
    key = (x_bD.device, x_bD.shape[1], x_bD.dtype)
    if key not in _chosen:
        points, centres = (torch.zeros(size, x_bD.shape[1], dtype=x_bD.dtype, device=x_bD.device) for size in _TRIAL)
        hidden_b = torch.full((len(points),), -1, dtype=torch.int64, device=x_bD.device)
        milliseconds: dict[Launch, float] = {}
        for launch in _LAUNCHES[operand_sD.dtype]:
            try:
                work = functools.partial(_run, points, centres, hidden_b, launch)
                milliseconds[launch] = timed(work, x_bD.device)
            except TritonError:  # too large for the GPU, or for its compiler
                continue
        if not milliseconds:
            raise RuntimeError(f"no block size of the nearest-centre kernel fits this GPU at D = {x_bD.shape[1]}")
        _chosen[key] = min(milliseconds, key=milliseconds.__getitem__)
    return _chosen[key]


def top_two(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest.top_two` in Triton."""
    x_bD, operand_sD = x_bD.to(operand_sD.dtype).contiguous(), operand_sD.contiguous()
    if interpreted() and operand_sD.dtype == torch.bfloat16:  # which it takes for integers: rounded is enough
        x_bD, operand_sD = x_bD.float(), operand_sD.float()
    if not x_bD.is_cuda:
        return _run(x_bD, operand_sD, hidden_b, _fastest(x_bD, operand_sD))
    with torch.cuda.device(x_bD.device):  # Triton launches on the current GPU, which need not be the tensors'
        return _run(x_bD, operand_sD, hidden_b, _fastest(x_bD, operand_sD))


def candidates(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who may be nearest: cosines (b, L), -inf for none, columns (b, L), int64, and the largest of all others, (b,).

    Arguments as for `top_two`. The largest cosine is among the L; they are in no order. By
    `clustering.nearest.kernel_nearest_hopper` where that runs.
    """
    if operand_sD.is_cuda and not interpreted():
        with torch.cuda.device(operand_sD.device):
            winners = _hopper(operand_sD.device, operand_sD.dtype, operand_sD.shape[1])
            if winners is not None:
                return winners(x_bD, operand_sD, hidden_b)
    first_b, column_b, second_b = top_two(x_bD, operand_sD, hidden_b)
    return first_b[:, None], column_b[:, None], second_b


@functools.cache
def _hopper(device: torch.device, dtype: torch.dtype, dim: int) -> Find | None:
    """The kernel for Hopper GPUs, if it is made for such centres and finds in a trial what a product in torch does."""
    if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from clustering.nearest.kernel_nearest_hopper import fits, winners  # noqa: PLC0415  needs a Triton that has Gluon

        if not fits(dim, device):
            return None
        wrong = _tried(winners, device, dim)
    except Exception as error:  # of an experimental language, which may fail in any way
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        say_once(f"the kernel for Hopper GPUs cannot run: {wrong}; the general one runs instead")
    return None if wrong else winners


def _tried(winners: Callable[..., tuple[Tensor, Tensor, Tensor]], device: torch.device, dim: int) -> str:
    """What is wrong with it on a small problem, of many tiles a program and of several programs a point; or nothing."""
    generator = torch.Generator(device).manual_seed(0)
    points, centres = 200, 3000
    rows = torch.randn(points + centres, dim, device=device, generator=generator)
    x_bD, operand_sD = torch.nn.functional.normalize(rows).bfloat16().split([points, centres])
    hidden_b = torch.arange(points, device=device) * 14 - 1
    with torch.autocast(device.type, enabled=False):
        true_bs = x_bD.float() @ operand_sD.float().T
    hides_b = hidden_b >= 0
    true_bs[hides_b, hidden_b[hides_b]] = float("-inf")
    for splits in (1, 3):
        cosine_bL, column_bL, rest_b = winners(x_bD, operand_sD, hidden_b, splits)
        off = (true_bs.gather(1, column_bL) - cosine_bL).abs().max()
        missed = (true_bs.amax(1) - cosine_bL.amax(1)).abs().max()
        over = (true_bs.scatter(1, column_bL, float("-inf")).amax(1) - rest_b).abs().max()
        if not max(float(off), float(missed), float(over)) < 1e-3:
            return f"its cosines are off by {float(off):.1e}, {float(missed):.1e} and {float(over):.1e}"
    return ""
