"""Which rank owns which class, row or cluster: pure functions, no process group, no device.

Every sharded thing in the project (class centres, embedding bank, cluster centres) is cut by the same rule:
`total` items in contiguous ranges, the first `total % world_size` ranks holding one item more. Ranges are
disjoint, cover everything, keep the order, and differ in length by at most one, for any `total` and any
`world_size` (a rank may own nothing when there are fewer items than ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """Half-open range [start, stop) of the global items that one rank owns."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def shard_of(rank: int, world_size: int, total: int) -> Shard:
    """Range of the items that `rank` owns.

    Raises ValueError when `rank` is not in [0, world_size) or a count is negative.
    """
    if world_size < 1 or total < 0 or not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size and total >= 0, got {rank=}, {world_size=}, {total=}")
    base, extra = divmod(total, world_size)
    start = rank * base + min(rank, extra)
    return Shard(start, start + base + (rank < extra))


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor that is cut over the ranks along its first dimension, as one rank holds them."""

    tensor: Tensor
    """(rows, …), this rank's."""
    start: int
    """The first of them, counted over all ranks."""
    total: int
    """Rows of all ranks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (self.total, *self.tensor.shape[1:])


def all_shards(world_size: int, total: int) -> list[Shard]:
    """Ranges of all ranks, in rank order."""
    return [shard_of(rank, world_size, total) for rank in range(world_size)]
