"""The nearest centre of each point, tile by tile, decided exactly, and an upper limit of all other cosines.

A float32 product of two matrices is off by its rounding, and rounds differently for other shapes. So it only finds who
may be nearest: every centre that comes within `tolerance` of the best is compared again by a float64 dot product of the
two rows alone, ties going to the smaller cluster. The result does not depend on tiles, blocks, order or ranks.

Two numbers are kept of the cosines of a tile, a few more by the kernel for Hopper GPUs: they are never written but into
a buffer that stays in a CPU's cache, or not at all on GPUs (`clustering.nearest.kernel_nearest`).

Legend: b points of a block, s centres of a tile, D embedding size, q pairs of a point and a centre; L candidates of a
point, l of them and one more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clustering.nearest.float64_rows import row_dots
from partial_fc.products import product

NONE = float("-inf")
_TILE = {"cpu": (512, 512), "cuda": (8192, 8192)}
"""Points and centres of a tile: 1 MB of float32 on CPUs, for each thread; 256 MB on GPUs."""
_CROWD = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Cosines at a time of points whose nearest centre is not clear."""
_OFFERED = 8
"""Candidates of a point that are compared exactly one by one; a point that needs more is one of a crowd."""
_RIVALS = 64
"""So many pairs a point are compared one by one; more, as in data that has collapsed, are thinned out first."""
_ROUNDING = 1e-12
"""Of a product in float64, with room to spare."""


def tolerance(product_dtype: torch.dtype) -> float:
    """How far a cosine of two unit rows by a product of that dtype may be from the true one, with room to spare.

    Of 8 x 10^7 cosines at D = 512, some of them near 1, the worst was off by 5e-7; with operands of bfloat16, by 6e-4.
    """
    return 2e-3 if product_dtype == torch.bfloat16 else 4e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """What is known of each point of a block; updated in place."""

    best_b: Tensor
    """float64: the cosine to the nearest centre so far, exact; -inf: none yet."""
    index_b: Tensor
    """int64: that centre's cluster; -1: none yet."""
    second_b: Tensor
    """float32: no other centre compared so far has a larger cosine, up to the tolerance; -inf: none yet."""

    @classmethod
    def unknown(cls, points: int, device: torch.device) -> Nearest:
        return cls(
            best_b=torch.full((points,), NONE, dtype=torch.float64, device=device),
            index_b=torch.full((points,), -1, dtype=torch.int64, device=device),
            second_b=torch.full((points,), NONE, device=device),
        )

    def offer_(self, row_b: Tensor, cluster_b: Tensor, cosine_b: Tensor) -> None:
        """Another centre for some distinct points. row_b: int64 places in the block. cosine_b: float64, exact."""
        best_b, index_b = self.best_b[row_b], self.index_b[row_b]
        better_b = (cosine_b > best_b) | ((cosine_b == best_b) & (cluster_b < index_b))
        loser_b = torch.where(better_b, best_b, cosine_b).float()
        self.second_b[row_b] = self.second_b[row_b].maximum(loser_b)
        self.best_b[row_b] = torch.where(better_b, cosine_b, best_b)
        self.index_b[row_b] = torch.where(better_b, cluster_b, index_b)

    def offer_pairs_(self, row_q: Tensor, cluster_q: Tensor, cosine_q: Tensor) -> None:
        """Any number of other centres for some points. cosine_q: float64, exact."""
        best_b = torch.full_like(self.best_b, NONE).scatter_reduce_(0, row_q, cosine_q, "amax")
        wins_q = cosine_q == best_b[row_q]
        last = torch.iinfo(torch.int64).max
        index_b = torch.full_like(self.index_b, last)
        index_b.scatter_reduce_(0, row_q[wins_q], cluster_q[wins_q], "amin")
        loses_q = cluster_q != index_b[row_q]
        self.second_b.scatter_reduce_(0, row_q[loses_q], cosine_q[loses_q].float(), "amax")
        row_b = (index_b != last).nonzero()[:, 0]
        self.offer_(row_b, index_b[row_b], best_b[row_b])

    def offer_each_(self, cluster_bL: Tensor, cosine_bL: Tensor) -> None:
        """The same for L places a point, without a host that waits. cosine_bL: float64, exact; -inf: nothing there."""
        best_b, last = cosine_bL.amax(1), torch.iinfo(torch.int64).max
        there_bL = cosine_bL > NONE
        index_b = torch.where(there_bL & (cosine_bL == best_b[:, None]), cluster_bL, last).amin(1)
        loser_b = cosine_bL.masked_fill(cluster_bL == index_b[:, None], NONE).amax(1)
        better_b = (best_b > self.best_b) | ((best_b == self.best_b) & (index_b < self.index_b))
        loser_b = loser_b.maximum(torch.where(better_b, self.best_b, best_b))
        self.second_b.copy_(self.second_b.maximum(loser_b.float()))
        self.best_b.copy_(torch.where(better_b, best_b, self.best_b))
        self.index_b.copy_(torch.where(better_b, index_b, self.index_b))


def top_two(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest cosine of each point, (b,), its column, int64, and the largest of the others, (b,); -inf for none.

    operand_sD: centres as the products take them, float32 or bfloat16 for cosines in float32, or float64; points are
    rounded alike. hidden_b: int64, a column that does not count, -1 for none. s >= 1. The first of equals is taken.
    """
    b, s, dtype = len(x_bD), len(operand_sD), operand_sD.dtype
    result = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = _TILE[x_bD.device.type]
    rows *= 1 if x_bD.is_cuda else torch.get_num_threads()
    first_b, second_b = (torch.full((b,), NONE, dtype=result, device=x_bD.device) for _ in range(2))
    column_b = torch.zeros(b, dtype=torch.int64, device=x_bD.device)
    buffer = torch.empty(min(rows, b) * min(columns, s), dtype=result, device=x_bD.device)
    for top in range(0, b, rows):
        part = slice(top, top + rows)
        x_nD, hidden_n = x_bD[part], hidden_b[part]
        for left in range(0, s, columns):
            tile_tD = operand_sD[left : left + columns]
            cosine_nt = buffer[: len(x_nD) * len(tile_tD)].view(len(x_nD), len(tile_tD))
            if dtype == x_nD.dtype == result:
                torch.mm(x_nD, tile_tD.T, out=cosine_nt)
            else:
                cosine_nt.copy_(product(x_nD, tile_tD.T, dtype))
            hide_(cosine_nt, hidden_n - left)
            _merge_(cosine_nt, left, first_b[part], column_b[part], second_b[part])
    return first_b, column_b, second_b


def hide_(cosine_nt: Tensor, hidden_n: Tensor) -> None:
    """Of each row the column that does not count, in place; a row without one names a column that the tile lacks."""
    row_q = ((hidden_n >= 0) & (hidden_n < cosine_nt.shape[1])).nonzero()[:, 0]
    cosine_nt[row_q, hidden_n[row_q]] = NONE


def _merge_(cosine_nt: Tensor, left: int, first_n: Tensor, column_n: Tensor, second_n: Tensor) -> None:
    """Two passes over the tile, which is overwritten: the largest, and the largest but that."""
    if cosine_nt.is_cuda:
        here_n = cosine_nt.argmax(1, keepdim=True)
    else:  # numpy's argmax takes 0.3 ns a number on a core with AVX2, torch's 1.9
        here_n = torch.from_numpy(np.argmax(cosine_nt.numpy(), axis=1))[:, None]
    largest_n = cosine_nt.gather(1, here_n)[:, 0]
    next_n = cosine_nt.scatter_(1, here_n, NONE).amax(1)
    better_n = largest_n > first_n
    second_n.copy_(torch.where(better_n, first_n, largest_n).maximum(second_n).maximum(next_n))
    column_n.copy_(torch.where(better_n, here_n[:, 0] + left, column_n))
    first_n.copy_(torch.where(better_n, largest_n, first_n))


def nearest_(
    state: Nearest, x_bD: Tensor, centres_sD: Tensor, operand_sD: Tensor, cluster_s: Tensor, *, kernels: bool
) -> None:
    """Compare every point of a block with every centre of a tile, except its own, `state.index_b`.

    x_bD: float32 unit rows. centres_sD: float32 unit rows, none of them zero. operand_sD: the same in the dtype of the
    products' operands, float32 or bfloat16. cluster_s: int64, their clusters, rising. kernels: use
    `clustering.nearest.kernel_nearest`. No collectives.
    """
    if not len(x_bD) or not len(centres_sD):
        return
    hidden_b = columns_of(state.index_b, cluster_s)
    if kernels:
        from clustering.nearest.kernel_nearest import candidates as find  # noqa: PLC0415  needs Triton
    else:
        find = _candidates
    cosine_bL, column_bL, rest_b = find(x_bD, operand_sD, hidden_b)
    if cosine_bL.shape[1] > _OFFERED:
        cosine_bl, place_bl = cosine_bL.topk(_OFFERED + 1)
        rest_b = rest_b.maximum(cosine_bl[:, -1])
        cosine_bL, column_bL = cosine_bl[:, :-1], column_bL.gather(1, place_bl[:, :-1])
    margin, first_b = tolerance(operand_sD.dtype), cosine_bL.amax(1)
    close_b = first_b >= state.best_b - margin
    enough_b = state.best_b.maximum(first_b) - margin
    crowded_b = close_b & (rest_b >= enough_b)
    offered_bL = (close_b & ~crowded_b)[:, None] & (cosine_bL >= enough_b[:, None])
    # In a crowd, below, the winner is offered: of the others it is one of the largest at most that need not count here.
    largest_bL = torch.zeros_like(offered_bL).scatter_(1, cosine_bL.argmax(1, keepdim=True), crowded_b[:, None])
    left_b = cosine_bL.masked_fill(offered_bL | largest_bL, NONE).amax(1).maximum(rest_b)
    state.second_b.copy_(state.second_b.maximum(left_b))
    (offer_all_ if x_bD.is_cuda else offer_some_)(state, x_bD, centres_sD, cluster_s, column_bL, offered_bL)
    for row_n in crowded_b.nonzero()[:, 0].split(max(1, _CROWD[x_bD.device.type] // len(centres_sD))):
        cosine_ns = product(x_bD[row_n], operand_sD.T, operand_sD.dtype)
        hide_(cosine_ns, hidden_b[row_n])
        rivals_ns = cosine_ns >= enough_b[row_n, None] - margin
        if int(rivals_ns.sum()) > _RIVALS * len(row_n):
            rivals_ns = _rivals(state.best_b[row_n], x_bD[row_n], centres_sD, hidden_b[row_n])
        at_q, column_q = rivals_ns.nonzero(as_tuple=True)
        row_q = row_n[at_q]
        state.offer_pairs_(row_q, cluster_s[column_q], row_dots(x_bD, row_q, centres_sD, column_q))


def offer_all_(
    state: Nearest, x_bD: Tensor, centres_sD: Tensor, cluster_s: Tensor, column_bL: Tensor, offered_bL: Tensor
) -> None:
    """Offer each point the columns that are marked, at places for all of them. No host waits."""
    column_q = torch.where(offered_bL, column_bL, -1).flatten()
    row_q = torch.arange(len(x_bD), device=x_bD.device).repeat_interleave(column_bL.shape[1], output_size=len(column_q))
    cosine_bL = row_dots(x_bD, row_q, centres_sD, column_q).view_as(column_bL)
    state.offer_each_(cluster_s[column_q.clamp_min(0)].view_as(column_bL), cosine_bL.masked_fill(~offered_bL, NONE))


def offer_some_(
    state: Nearest, x_bD: Tensor, centres_sD: Tensor, cluster_s: Tensor, column_bL: Tensor, offered_bL: Tensor
) -> None:
    """The same with no place for what is not marked."""
    row_q, place_q = offered_bL.nonzero(as_tuple=True)
    column_q = column_bL[row_q, place_q]
    offer_ = state.offer_ if column_bL.shape[1] == 1 else state.offer_pairs_
    offer_(row_q, cluster_s[column_q], row_dots(x_bD, row_q, centres_sD, column_q))


def _rivals(best_n: Tensor, x_nD: Tensor, centres_sD: Tensor, hidden_n: Tensor) -> Tensor:
    """Which centres may be nearest, by a product in float64, bool (n, s): for points that have many about as near.

    Of centres that are copies of each other only the first is one: it wins their ties.
    """
    cosine_ns = x_nD.double() @ centres_sD.double().T
    hide_(cosine_ns, hidden_n)
    rivals_ns = cosine_ns >= (cosine_ns.amax(1).maximum(best_n) - _ROUNDING)[:, None]
    column_s = torch.arange(len(centres_sD), device=centres_sD.device)
    key_s = row_dots(centres_sD, None, centres_sD[:1], torch.zeros_like(column_s))  # equal for copies
    order_s = key_s.argsort(stable=True)
    sorted_sD = centres_sD[order_s]
    copy_s = torch.zeros_like(column_s, dtype=torch.bool)
    copy_s[order_s[1:]] = (sorted_sD[1:] == sorted_sD[:-1]).all(1)
    return rivals_ns & ~copy_s


def _candidates(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first_b, column_b, second_b = top_two(x_bD, operand_sD, hidden_b)
    return first_b[:, None], column_b[:, None], second_b


def columns_of(cluster_b: Tensor, cluster_s: Tensor) -> Tensor:
    """Place of each cluster among the rising `cluster_s`, int64 (b,); -1 where it is not there."""
    column_b = torch.searchsorted(cluster_s, cluster_b).clamp_max(len(cluster_s) - 1)
    return torch.where(cluster_s[column_b] == cluster_b, column_b, -1)
