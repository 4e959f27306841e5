"""Order of the samples: a shuffle that needs no memory, and the cut of an order into global batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.order.hashing import ORDER, keys
from data.order.permutation import ROUNDS, permute

Int64s = npt.NDArray[np.int64]


class Order(Protocol):
    """Which sample stands where in an epoch: a pure function of (seed, epoch, position)."""

    seed: int
    num_positions: int
    """Of every epoch."""
    group: int
    """Positions [i group, (i + 1) group) belong together, and on one rank."""

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """Samples at the positions of the epoch's order. positions: int64, any shape, in [0, num_positions)."""

    def coming(self, epoch: int, step: range, mine: Int64s, *, first: bool) -> Int64s:
        """Samples to begin to get, where they are far away, when a step is planned.

        step: its positions, of all ranks; mine: this rank's samples of it; first: whether it is the first of a run.
        """
        return mine


class EpochOrder(Order):
    """The plain shuffle: a permutation of [0, num_samples) for each epoch. Nothing is stored, however many samples."""

    group = 1

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1 or seed < 0:
            raise DataError(f"expected at least one sample and a seed of 0 or more, got {num_samples=}, {seed=}")
        self.num_positions, self.seed = num_samples, seed

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """See `Order`."""
        check_positions(positions, self.num_positions)
        round_keys = keys(ROUNDS, seed=self.seed, epoch=epoch, purpose=ORDER)
        return permute(positions.astype(np.uint64), np.uint64(self.num_positions), round_keys).astype(np.int64)


class BatchPlan:
    """Which samples a rank takes in which step.

    A step takes the next G positions of the epoch's order, G = batch_size * world_size, and a rank its contiguous slice
    of them: the global batch depends on G alone, not on the number of ranks. How far an epoch is, is one number, the
    positions that all ranks together have had; from there any other number of ranks goes on with the same sequence.
    Every rank makes n // G steps from the start, n being the order's positions; the n % G of the tail are left out. In
    the plain shuffle no sample comes twice in an epoch, and the tail has others in each.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, rank: int, world_size: int, seed: int, order: Order | None = None
    ) -> None:
        """order: of these samples, by this seed; None: the plain shuffle.

        Raises DataError when the order does not fill one global batch, or when a rank's would cut a group.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"expected batch_size >= 1 and 0 <= rank < world_size, got {batch_size=}, {rank=}, {world_size=}"
            )
        self.order = EpochOrder(num_samples, seed=seed) if order is None else order
        self.batch_size, self.global_batch = batch_size, batch_size * world_size
        group, positions = self.order.group, self.order.num_positions
        if batch_size % group:
            raise DataError(
                f"train.batch_size: expected a multiple of data.images_per_identity = {group}, as an identity's group "
                f"lies on one rank, got {batch_size}: use {batch_size + -batch_size % group}, or another group"
            )
        self.steps_per_epoch = positions // self.global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"batch too large: {world_size} rank(s) x {batch_size} images = {self.global_batch} a step, but an "
                f"epoch has {positions} images: lower train.batch_size, or use fewer ranks"
            )
        self._slice_B = np.arange(rank * batch_size, (rank + 1) * batch_size, dtype=np.int64)

    def starts(self, start: int = 0) -> range:
        """Where the steps begin from the position `start` on. Raises DataError outside of the epoch."""
        if not 0 <= start <= self.order.num_positions:
            raise DataError(f"expected to begin at 0 to {self.order.num_positions} images of the epoch, got {start}")
        return range(start, self.order.num_positions - self.global_batch + 1, self.global_batch)

    def samples(self, epoch: int, start: int | Sequence[int]) -> Int64s:
        """Sample ids of this rank in the step that begins at the position `start`, int64 (B,); of several, (S, B)."""
        return self.order.samples(epoch, self._slice_B + np.asarray(start)[..., None])

    def coming(self, epoch: int, start: int, samples_B: Int64s, *, first: bool) -> Int64s:
        """What to begin to get for the step that begins there, and of which this rank has these: see `Order`."""
        return self.order.coming(epoch, range(start, start + self.global_batch), samples_B, first=first)


def check_positions(positions: Int64s, count: int) -> None:
    """Raise IndexError unless all are in [0, count)."""
    if positions.size and not 0 <= positions.min() <= positions.max() < count:
        raise IndexError(f"positions {positions.min()} … {positions.max()} are not within 0 … {count - 1}")
