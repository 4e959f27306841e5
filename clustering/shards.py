"""Moving rows that are sharded by cluster: every rank in turn shows its rows, or receives the sum of all ranks'.

Legend: S rows of one rank's shard, D embedding size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sharding import Shard


def show_rows(own_SD: Tensor, shard: Shard, source: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of rank `source` (whose shard is `shard`), on every rank. One broadcast, none on one rank."""
    if dist.get_world_size(group) == 1:
        return own_SD
    if not shard.size:
        return own_SD[:0]
    mine = dist.get_rank(group) == source
    rows_SD = own_SD.contiguous() if mine else own_SD.new_empty(shard.size, own_SD.shape[1])
    dist.broadcast(rows_SD, group=group, group_src=source)
    return rows_SD


def sum_rows_(partial_SD: Tensor, to: int, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, valid on rank `to` alone; overwrites `partial_SD`. One reduce, none on one rank."""
    if dist.get_world_size(group) > 1 and partial_SD.numel():
        dist.reduce(partial_SD, group=group, group_dst=to)
    return partial_SD


def add_rows_(sums_SD: Tensor, row_Q: Tensor, x_PD: Tensor, point_Q: Tensor, *, block: int = 65536) -> Tensor:
    """sums[row_q] += x[point_q] in the dtype of the sums, `block` rows at a time: a bf16 bank is never copied whole."""
    for rows, points in zip(row_Q.split(block), point_Q.split(block), strict=True):
        sums_SD.index_add_(0, rows, x_PD[points].to(sums_SD.dtype))
    return sums_SD


def unit_or(sums_SD: Tensor, otherwise_SD: Tensor) -> Tensor:
    """Rows scaled to unit length; a zero row (nothing was added) takes the row of `otherwise_SD`."""
    length_S1 = sums_SD.norm(dim=1, keepdim=True)
    tiny = torch.finfo(sums_SD.dtype).tiny
    return torch.where(length_S1 > tiny, sums_SD / length_S1.clamp_min(tiny), otherwise_SD)
