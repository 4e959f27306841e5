"""Moving rows that are sharded by cluster, and sums of rows that are the same bits in any order.

Every rank in turn shows its rows, or receives the sum of all ranks'. Sums that several ranks add to are whole numbers
of 2^-40: additions of those are exact, so neither the number of ranks nor an accelerator's order of additions shows in
them. Components of unit rows fit 2^23 times.

Legend: S rows of one rank's shard, D embedding size, P points of this rank, Q some of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sharding import Shard

# As in `partial_fc.collectives`: older builds know the former name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

FIXED_ONE = 2.0**40
"""1 in fixed point. Scaling by it is exact; a bf16 component from 2^-32 up is a whole number then."""


def show_rows(
    own_SD: Tensor, shard: Shard, source: int, group: dist.ProcessGroup, into_XD: Tensor | None = None
) -> Tensor:
    """The rows of rank `source` (whose shard is `shard`), on every rank. One broadcast, none on one rank.

    into_XD: at least S rows of the same dtype to receive them in, so that nothing is allocated; they are returned as a
    part of it, or of `own_SD` on their owner, and stay until it is used again.
    """
    if dist.get_world_size(group) == 1:
        return own_SD
    if not shard.size:
        return own_SD[:0]
    if dist.get_rank(group) == source:
        rows_SD = own_SD.contiguous()
    else:
        rows_SD = own_SD.new_empty(shard.size, own_SD.shape[1]) if into_XD is None else into_XD[: shard.size]
    dist.broadcast(rows_SD, group=group, group_src=source)
    return rows_SD


def sum_rows_(partial_SD: Tensor, to: int, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, valid on rank `to` alone; overwrites `partial_SD`. One reduce, none on one rank."""
    if dist.get_world_size(group) > 1 and partial_SD.numel():
        dist.reduce(partial_SD, group=group, group_dst=to)
    return partial_SD


def own_row_of_sum_(row_L: Tensor, table_WL: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of this rank's row of their tables, into `row_L`. One reduce-scatter.

    table_WL: contiguous, a row for each of the W ranks; its numbers are lost.
    """
    _reduce_scatter(row_L, table_WL.view(-1), group=group)
    return row_L


def add_rows_(sums_SD: Tensor, row_Q: Tensor, x_PD: Tensor, point_Q: Tensor, *, block: int = 65536) -> Tensor:
    """sums[row_q] += x[point_q], `block` rows at a time: a bf16 bank is never copied whole.

    In the dtype of the sums; int64 sums are in fixed point (`FIXED_ONE`).
    """
    for rows, points in zip(row_Q.split(block), point_Q.split(block), strict=True):
        x_qD = x_PD[points]
        if sums_SD.dtype == torch.int64:
            x_qD = x_qD.to(torch.promote_types(x_qD.dtype, torch.float32)).mul_(FIXED_ONE).round_()
        sums_SD.index_add_(0, rows, x_qD.to(sums_SD.dtype))
    return sums_SD


def unit_or(sums_SD: Tensor, otherwise_SD: Tensor) -> Tensor:
    """Rows scaled to unit length; a zero row (nothing was added) takes the row of `otherwise_SD`."""
    length_S1 = sums_SD.norm(dim=1, keepdim=True)
    tiny = torch.finfo(sums_SD.dtype).tiny
    return torch.where(length_S1 > tiny, sums_SD / length_S1.clamp_min(tiny), otherwise_SD)
