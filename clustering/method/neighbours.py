"""Which classes lie nearest to each class: those that a sampled softmax should not miss. Ours, see docs/method.md.

A face is taken for another mostly by a few look-alike classes; a sample of a tenth of all classes holds each of
them one time in ten. They are found once a refresh, from anchors (`clustering.service.published`), and kept on every
rank: 4 bytes a neighbour, so that a step reads them without a collective.

Legend: R classes of this rank, S classes of a shard, C all classes, D embedding size, b rows and s columns of a tile,
k neighbours of a class.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import FIT_LEVELS, fit_level
from clustering.service.shards import show_rows
from partial_fc.collectives import all_reduce_
from sharding import all_shards

_BLOCK = 1024  # rows of a tile
_TILE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 23}  # cosines of a tile; as levels and keys they take some 30 bytes each


class NearestClasses:
    """The `count` other classes of largest cosine to each class, found shard by shard of the classes.

    A zero row is a class that was never seen: it has no neighbours and is nobody's. Cosines are compared on k-means's
    grid (`fit_level`), ties go to the smaller class, so that rounding, and with it the number of ranks, seldom chooses.
    It takes C^2 D multiplications over all ranks, a share C / (samples x iterations) of those of the refresh itself;
    (C, C) is never kept. No method runs a collective.
    """

    def __init__(self, *, num_rows: int, first_class: int, num_classes: int, count: int, device: torch.device) -> None:
        """num_rows: R. first_class: the first of this rank's. count: k, may be 0."""
        self._first, self._num_classes = first_class, num_classes
        self._key_Rk = torch.full((num_rows, count), -1, dtype=torch.int64, device=device)
        self._table_Ck = torch.zeros(num_classes, count, dtype=torch.int32, device=device)

    @torch.no_grad()
    def compare(self, anchor_RD: Tensor, rows: slice, shown_SD: Tensor, first_column: int) -> None:
        """Take the classes of one shard into the nearest of `rows`. Anchors: float32 or float64 unit rows."""
        key_bk, x_bD = self._key_Rk[rows], anchor_RD[rows]
        if key_bk.numel() and len(shown_SD):
            _take_nearer_(key_bk, x_bD, self._first + (rows.start or 0), shown_SD, first_column, self._num_classes)

    def table(self) -> Tensor:
        """This rank's rows, the nearest first, -1 for none, and zeros elsewhere: int32 (C, k), to be summed."""
        key_Rk = self._key_Rk
        nearest_Rk = torch.where(key_Rk >= 0, self._num_classes - 1 - key_Rk % self._num_classes, -1)
        self._table_Ck[self._first : self._first + len(key_Rk)] = nearest_Rk.int()
        return self._table_Ck


def nearest_classes(anchor_RD: Tensor, num_classes: int, count: int, group: dist.ProcessGroup) -> Tensor:
    """`NearestClasses` at once: int32 (C, count), on every rank; -1 where a class has fewer than `count`.

    anchor_RD: float32 or float64 unit rows of this rank's classes. Collectives: one broadcast a rank, one all-reduce of
    the table.
    """
    shards = all_shards(dist.get_world_size(group), num_classes)
    own = shards[dist.get_rank(group)]
    nearest = NearestClasses(
        num_rows=own.size, first_class=own.start, num_classes=num_classes, count=count, device=anchor_RD.device
    )
    for source, shard in enumerate(shards):
        nearest.compare(anchor_RD, slice(0, own.size), show_rows(anchor_RD, shard, source, group), shard.start)
    return all_reduce_(nearest.table(), group)


def _take_nearer_(
    key_Rk: Tensor, anchor_RD: Tensor, first_row: int, shown_SD: Tensor, first_column: int, num_classes: int
) -> None:
    """Merge the classes of one shard into the nearest so far; key = level x C + (C - 1 - class), -1 for none.

    Keys differ from class to class, so topk has no ties to break as it likes.
    """
    k = key_Rk.shape[1]
    columns = max(64, _TILE_NUMBERS.get(anchor_RD.device.type, 1 << 20) // _BLOCK)
    class_S = torch.arange(first_column, first_column + len(shown_SD), device=shown_SD.device)
    missing_S = (shown_SD == 0).all(1)
    for start in range(0, len(anchor_RD), _BLOCK):
        x_bD, best_bk = anchor_RD[start : start + _BLOCK], key_Rk[start : start + _BLOCK]
        class_b1 = torch.arange(first_row + start, first_row + start + len(x_bD), device=x_bD.device)[:, None]
        missing_b1 = (x_bD == 0).all(1, keepdim=True)
        for tile in range(0, len(shown_SD), columns):
            part = slice(tile, tile + columns)
            class_s = class_S[part]
            level_bs = fit_level(x_bD @ shown_SD[part].T) + FIT_LEVELS
            key_bs = level_bs * num_classes + (num_classes - 1 - class_s)
            key_bs.masked_fill_(missing_b1 | missing_S[part] | (class_s == class_b1), -1)
            nearest = key_bs.topk(min(k, len(class_s)), dim=1, sorted=False).values
            best_bk.copy_(torch.cat([best_bk, nearest], dim=1).topk(k, dim=1).values)
