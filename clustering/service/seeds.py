"""Which samples begin which empty clusters, over all ranks: step 3 of `clustering.kmeans`, which is read first.

A candidate's place in the order (fit, class) over all ranks is a count: of all candidates of lower levels, of those of
its own level on the ranks before this one, which own smaller classes, and of those before it here. Fits have few
levels, so counts by level take the place of lists: nothing that is sent or kept grows with classes or clusters, but
for a rank's own candidates.

The sum over the ranks before is a reduce-scatter of a table with a row for each rank, into which a rank writes its
counts for every rank behind it; so many levels at a time that the table keeps its size on any number of ranks. An
all-to-all there and back would send less in two calls, but makes NCCL keep buffers for each of the other ranks; a
reduce-scatter uses what the gradient of the embeddings uses in every step.

Legend: P points of this rank, R of them that may seed, Q candidates, one a class, K clusters, E of them empty,
L levels, l of them at a time, W ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import FIT_LEVELS, WELL_FITTED, fit_level
from clustering.service.shards import own_row_of_sum_
from partial_fc.collectives import all_reduce_

LEVELS = FIT_LEVELS + WELL_FITTED
"""From a cosine of -1 to the last one that needs a seed."""
_NUMBERS = 1 << 22
"""Of a table, int32: 16 MB."""
CLUSTERS_AT_ONCE = 1 << 22
"""Looked through at a time: some 40 MB."""


def exchanges(ranks: int, numbers: int = _NUMBERS) -> tuple[int, int]:
    """Reduce-scatters of a seeding on so many ranks, and l, the levels of each. numbers: of a table at most."""
    times = -(-LEVELS // max(1, numbers // ranks))
    return times, -(-LEVELS // times)


def buffer_bytes(ranks: int) -> int:
    """What an `Order` keeps."""
    times, width = exchanges(ranks)
    return 4 * width * (3 * times + (ranks if ranks > 1 else 0))


def worst_of_each_class(best_P: Tensor, counted_P: Tensor, class_P: Tensor) -> tuple[Tensor, Tensor]:
    """Of each class here, the counted point of lowest fit, the first of equals, if any needs a seed: and its level.

    best_P: cosines. counted_P: bool. class_P: int64, ascending. Both int64 (Q,), classes ascending. No collective.
    """
    level_P = fit_level(best_P)
    point_R = (counted_P & (level_P < WELL_FITTED)).nonzero()[:, 0]
    by_fit_R = point_R[level_P[point_R].argsort(stable=True)]
    sorted_R = by_fit_R[class_P[by_fit_R].argsort(stable=True)]
    class_R = class_P[sorted_R]
    first_R = torch.ones_like(class_R, dtype=torch.bool)
    first_R[1:] = class_R[1:] != class_R[:-1]
    point_Q = sorted_R[first_R]
    return point_Q, level_P[point_Q]


class Order:
    """Places of candidates in the order (fit, class) over all ranks.

    A seeding is `count_`, `exchange_` and `places`. Local work and collectives lie in methods of their own: ranks on
    which the first fails go through the second with no candidate.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, numbers: int = _NUMBERS) -> None:
        """Makes all buffers. numbers: as `exchanges` has it, the same on all ranks. No collective."""
        self._group, self._rank = group, dist.get_rank(group)
        self._ranks = dist.get_world_size(group)
        times, self._width = exchanges(self._ranks, numbers)
        # int32 holds any number of classes: published clusters are int32 as well, and are as many at least.
        self._here_L, self._all_L, self._before_L = torch.zeros(
            3, times * self._width, dtype=torch.int32, device=device
        )
        shape = (self._ranks if self._ranks > 1 else 0, self._width)
        self._table_Wl = torch.zeros(shape, dtype=torch.int32, device=device)

    def count_(self, level_Q: Tensor) -> None:
        """Take in this rank's candidates, int64 levels below `WELL_FITTED`. No collective."""
        self._here_L.copy_(torch.bincount(level_Q + FIT_LEVELS, minlength=len(self._here_L)))

    def clear_(self) -> None:
        """No candidate here."""
        self._here_L.zero_()

    def exchange_(self) -> None:
        """Count those of the other ranks. One all-reduce and `exchanges` reduce-scatters, none on one rank."""
        all_reduce_(self._all_L.copy_(self._here_L), self._group)
        self._before_L.zero_()
        if self._ranks == 1:
            return
        parts = zip(self._here_L.split(self._width), self._before_L.split(self._width), strict=True)
        for here_l, before_l in parts:
            self._table_Wl[: self._rank + 1] = 0
            self._table_Wl[self._rank + 1 :] = here_l
            own_row_of_sum_(before_l, self._table_Wl, self._group)

    def places(self, level_Q: Tensor) -> Tensor:
        """Of the candidates that were counted, whose classes ascend: int64 (Q,), from 0 on. No collective."""
        first_L = self._all_L.cumsum(0).sub_(self._all_L).add_(self._before_L)  # of each level's first one here
        first_L.sub_(self._here_L.cumsum(0)).add_(self._here_L)  # less those before it here
        by_level_Q = level_Q.argsort(stable=True)
        place_Q = torch.empty_like(level_Q)
        place_Q[by_level_Q] = first_L[level_Q[by_level_Q] + FIT_LEVELS]
        numbers_Q = torch.empty_like(level_Q)
        numbers_Q[by_level_Q] = torch.arange(len(level_Q), device=level_Q.device)
        return place_Q.add_(numbers_Q)


def empty_clusters(counts_K: Tensor) -> int:
    """E. counts_K: members of every cluster. Waits for the device."""
    return int(torch.stack([(part == 0).sum() for part in counts_K.split(CLUSTERS_AT_ONCE)]).sum())


def nth_empty(counts_K: Tensor, place_Q: Tensor) -> Tensor:
    """The place-th of the empty clusters, int64 (Q,). place_Q: int64, each in [0, E). Never makes a list of all E."""
    cluster_Q = torch.empty_like(place_Q)
    start = before = 0
    for part in counts_K.split(CLUSTERS_AT_ONCE):
        empty_e = (part == 0).nonzero()[:, 0]
        here_Q = (place_Q >= before) & (place_Q < before + len(empty_e))
        cluster_Q[here_Q] = empty_e[place_Q[here_Q] - before] + start
        start, before = start + len(part), before + len(empty_e)
    return cluster_Q
