"""Who may be nearest, on Hopper GPUs: a product of matrices as fast as a library's, that never writes a cosine.

The kernel of `clustering.nearest.kernel_nearest` waits for memory while it looks for the largest numbers of a tile, and
the other way round. Here warps have trades. One lets the copy engine bring centres, tile by tile; two groups of four
each multiply 64 points, which stay in shared memory, with the tiles, and while one group looks through its cosines the
other has the tensor cores. In an H100 that runs at 0.87 of the rate of a plain product of large matrices
(docs/experiments.md).

Of every tile a point's largest cosine, with its centre, is a candidate, and the four best candidates are kept. To keep
cosine and column in one number, the column within the tile replaces the last 8 bits of the cosine: 3e-5 of it, a
hundredth of what operands of bfloat16 are off by.

Written in Gluon, Triton's language for one kind of GPU, which still changes from version to version and has no
interpreter: `clustering.nearest.kernel_nearest` tries it before use, and does without where it does not run.

Legend: b points, n of one group's; s centres, c of one tile; D embedding size, k columns at a time, P splits of the
centres, L = 4 candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LISTED = 4
_ROWS, _CENTRES, _COLUMNS = 64, 256, 64
"""Points of a group, centres of a tile, columns at a time: the largest product of one instruction, 128 bytes a row."""
_MOST_STAGES = 6
_SPARE = 1024  # bytes of shared memory, for barriers and reductions
_NOTHING = -3.0  # is below any cosine, and above what the kernel puts where there is none
_REGISTERS = 168  # a thread of three groups of four warps: 240 for those that multiply, 24 for the one that fetches


@gluon.jit
def _insert(cosine_n, tile, v1, v2, v3, v4, t1, t2, t3, t4):
    """Into the four best, sorted: v cosines, t first columns of their tiles."""
    above1, above2, above3, above4 = cosine_n > v1, cosine_n > v2, cosine_n > v3, cosine_n > v4
    v4 = gl.where(above3, v3, gl.where(above4, cosine_n, v4))
    t4 = gl.where(above3, t3, gl.where(above4, tile, t4))
    v3 = gl.where(above2, v2, gl.where(above3, cosine_n, v3))
    t3 = gl.where(above2, t2, gl.where(above3, tile, t3))
    v2 = gl.where(above1, v1, gl.where(above2, cosine_n, v2))
    t2 = gl.where(above1, t1, gl.where(above2, tile, t2))
    v1 = gl.where(above1, cosine_n, v1)
    t1 = gl.where(above1, tile, t1)
    return v1, v2, v3, v4, t1, t2, t3, t4


@gluon.jit
def _store(cosine, column, at, v_n, t_n, here_n, TILE: gl.constexpr):
    gl.store(cosine + at, v_n, mask=here_n)
    gl.store(column + at, t_n + (v_n.to(gl.int32, bitcast=True) & (TILE - 1)), mask=here_n)


@gluon.jit
def _search(
    group: gl.constexpr, smem, bars, hidden, found, B, S, split_size,
    STEPS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What each group of four warps does: all of the split's centres, for its 64 points."""
    x_smem, centre_smem = smem
    x_bar, full_bars, empty_bars = bars
    cosine, column, rest = found
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    n = gl.program_id(0) * (2 * ROWS) + group * ROWS + gl.arange(0, ROWS, layout=rows)
    c = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    hidden_n = gl.load(hidden + gl.minimum(n, B - 1)).to(gl.int32)
    low = gl.min(gl.where(hidden_n >= 0, hidden_n, 2147483647), axis=0)
    high = gl.max(hidden_n, axis=0)
    v1 = gl.full([ROWS], -4.0, gl.float32, layout=rows)  # below any cosine, and still a number with bits to set
    v2, v3, v4, rest_n = v1, v1, v1, v1
    t1 = gl.zeros([ROWS], gl.int32, layout=rows)
    t2, t3, t4 = t1, t1, t1
    start = gl.program_id(1) * split_size
    stop = gl.minimum(start + split_size, S)
    cosine_nc = gl.zeros([ROWS, TILE], gl.float32, layout=layout)
    stage = 0
    phase = 0
    before = 0
    mbarrier.wait(x_bar, 0)
    for tile in range(start, stop, TILE):
        for k in gl.static_range(STEPS):
            mbarrier.wait(full_bars.index(stage), phase)
            cosine_nc = warpgroup_mma(
                x_smem.index(group * STEPS + k), centre_smem.index(stage).permute((1, 0)), cosine_nc,
                use_acc=k > 0, is_async=True,
            )  # fmt: skip
            if k > 0:
                cosine_nc = warpgroup_mma_wait(1, (cosine_nc,))
                mbarrier.arrive(empty_bars.index(before), count=1)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        cosine_nc = warpgroup_mma_wait(0, (cosine_nc,))
        mbarrier.arrive(empty_bars.index(before), count=1)
        found_nc = cosine_nc
        if tile + TILE > stop:  # the copy engine puts zeros beyond the last centre
            found_nc = gl.where((tile + c >= stop)[None, :], -4.0, found_nc)
        if (tile + TILE > low) & (tile <= high):
            found_nc = gl.where(c[None, :] == (hidden_n - tile)[:, None], -4.0, found_nc)
        bits_nc = (found_nc.to(gl.int32, bitcast=True) & (-TILE)) | c[None, :]
        found_nc = bits_nc.to(gl.float32, bitcast=True)
        largest_n = gl.max(found_nc, axis=1)
        next_n = gl.max(gl.where(found_nc == largest_n[:, None], -4.0, found_nc), axis=1)
        rest_n = gl.maximum(rest_n, gl.maximum(next_n, gl.minimum(largest_n, v4)))
        v1, v2, v3, v4, t1, t2, t3, t4 = _insert(largest_n, tile, v1, v2, v3, v4, t1, t2, t3, t4)
    split = gl.program_id(1).to(gl.int64)
    here_n = n < B
    at = split * 4 * B + n
    _store(cosine, column, at, v1, t1, here_n, TILE)
    _store(cosine, column, at + B, v2, t2, here_n, TILE)
    _store(cosine, column, at + 2 * B, v3, t3, here_n, TILE)
    _store(cosine, column, at + 3 * B, v4, t4, here_n, TILE)
    gl.store(rest + split * B + n, rest_n, mask=here_n)


@gluon.jit
def _fetch(
    x_tiles, centre_tiles, smem, bars, S, split_size,
    STEPS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What one warp does: the points of both groups once, then the split's centres, as stages become free."""
    x_smem, centre_smem = smem
    x_bar, full_bars, empty_bars = bars
    mbarrier.expect(x_bar, 2 * STEPS * ROWS * COLUMNS * 2)
    for group in gl.static_range(2):
        for k in gl.static_range(STEPS):
            corner = [gl.program_id(0) * (2 * ROWS) + group * ROWS, k * COLUMNS]
            tma.async_copy_global_to_shared(x_tiles, corner, x_bar, x_smem.index(group * STEPS + k))
    start = gl.program_id(1) * split_size
    stop = gl.minimum(start + split_size, S)
    stage = 0
    phase = 0
    for tile in range(start, stop, TILE):
        for k in gl.static_range(STEPS):
            mbarrier.wait(empty_bars.index(stage), phase ^ 1)
            bar = full_bars.index(stage)
            mbarrier.expect(bar, TILE * COLUMNS * 2)
            tma.async_copy_global_to_shared(centre_tiles, [tile, k * COLUMNS], bar, centre_smem.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit(do_not_specialize=["B", "S", "split_size"])
def _winners_kernel(
    x_tiles, centre_tiles, hidden, cosine, column, rest, B, S, split_size,
    STEPS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * STEPS, ROWS, COLUMNS], x_tiles.layout)
    centre_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, COLUMNS], centre_tiles.layout)
    x_bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_bar = x_bars.index(0)
    mbarrier.init(x_bar, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(stage), count=1)
        mbarrier.init(empty_bars.index(stage), count=2)  # both groups have done with it
    smem = (x_smem, centre_smem)
    bars = (x_bar, full_bars, empty_bars)
    found = (cosine, column, rest)
    gl.warp_specialize(
        [
            (_search, (0, smem, bars, hidden, found, B, S, split_size, STEPS, ROWS, TILE, STAGES)),
            (_search, (1, smem, bars, hidden, found, B, S, split_size, STEPS, ROWS, TILE, STAGES)),
            (_fetch, (x_tiles, centre_tiles, smem, bars, S, split_size, STEPS, ROWS, TILE, COLUMNS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def stages_of(dim: int, shared_bytes: int) -> int:
    """Tiles of centres that fit into shared memory beside the points."""
    points = 2 * -(-dim // _COLUMNS) * _ROWS * _COLUMNS * 2
    return min(_MOST_STAGES, (shared_bytes - _SPARE - points) // (_CENTRES * _COLUMNS * 2))


def fits(dim: int, device: torch.device) -> bool:
    """Whether the kernel is made for bfloat16 centres of so many numbers: a multiple of 8, up to 512 on an H100."""
    return dim % 8 == 0 and stages_of(dim, _shared_bytes(device)) >= 3


def _shared_bytes(device: torch.device) -> int:
    about: Any = torch.cuda.get_device_properties(device)  # its stub lacks the number
    return int(about.shared_memory_per_block_optin)


def splits_of(blocks: int, tiles: int, cores: int) -> int:
    """Into how many parts centres are split: the fewest with which few cores are idle at the end."""
    rounds = [-(-blocks * P // cores) * -(-tiles // P) for P in range(1, min(tiles, 32) + 1)]
    return next(P for P, tiles_in_turn in enumerate(rounds, 1) if tiles_in_turn <= 1.05 * min(rounds))


def winners(
    x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor, splits: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of each point: cosines (b, P L), float32, -inf for none; columns (b, P L), int64; and the largest of
    all other cosines, (b,).

    operand_sD: bfloat16, of a D that `fits`. hidden_b: int64, a column that does not count, -1 for none. splits: P at
    most; chosen if None. The largest is among the candidates; a cosine is off by 3e-5 of itself besides what its
    operands' rounding does.
    """
    order_b = hidden_b.argsort()  # so that few tiles have a column to hide
    x_bD = x_bD[order_b].to(torch.bfloat16)
    (b, D), s = x_bD.shape, len(operand_sD)
    cores = torch.cuda.get_device_properties(x_bD.device).multi_processor_count
    blocks, tiles = -(-b // (2 * _ROWS)), -(-s // _CENTRES)
    split_size = -(-tiles // (splits or splits_of(blocks, tiles, cores))) * _CENTRES
    P = -(-s // split_size)
    cosine_PLb = torch.empty(P, LISTED, b, device=x_bD.device)
    column_PLb = torch.empty(P, LISTED, b, dtype=torch.int32, device=x_bD.device)
    rest_Pb = torch.empty(P, b, device=x_bD.device)
    layouts = [gl.NVMMASharedLayout.get_default_for([size, _COLUMNS], gl.bfloat16) for size in (_ROWS, _CENTRES)]
    _winners_kernel[(blocks, P)](
        TensorDescriptor.from_tensor(x_bD, [_ROWS, _COLUMNS], layouts[0]),
        TensorDescriptor.from_tensor(operand_sD.contiguous(), [_CENTRES, _COLUMNS], layouts[1]),
        hidden_b[order_b], cosine_PLb, column_PLb, rest_Pb, b, s, split_size,
        STEPS=-(-D // _COLUMNS), ROWS=_ROWS, TILE=_CENTRES, COLUMNS=_COLUMNS,
        STAGES=stages_of(D, _shared_bytes(x_bD.device)), num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
    found_Mb, rest_b = cosine_PLb.flatten(0, 1), rest_Pb.amax(0)
    cosine_bM = torch.empty(b, P * LISTED, device=x_bD.device)
    column_bM = torch.empty(b, P * LISTED, dtype=torch.int64, device=x_bD.device)
    cosine_bM[order_b] = found_Mb.masked_fill(found_Mb < _NOTHING, float("-inf")).T
    column_bM[order_b] = column_PLb.flatten(0, 1).T.long()
    rest_b = torch.empty_like(rest_b).scatter_(0, order_b, rest_b)
    return cosine_bM, column_bM, rest_b.masked_fill(rest_b < _NOTHING, float("-inf"))
