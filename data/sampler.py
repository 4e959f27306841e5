"""Order of the samples: a shuffle that needs no memory, and its cut into global batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.hashing import ORDER, UInt64s, keys, mix

Int64s = npt.NDArray[np.int64]

_ROUNDS = 8
"""Four rounds make a Feistel network a pseudorandom permutation (Luby, Rackoff 1988) when its halves are large;
here they hold sqrt(n) values only. With eight, pairs of samples are uniform over pairs of places from n = 2 on."""


class EpochOrder:
    """A permutation of [0, num_samples) for each epoch: a pure function of (seed, epoch, position).

    A Feistel network over the square a * a >= num_samples, a = ceil(sqrt(num_samples)), whose halves add modulo a.
    A value outside the range is sent through again until it lands inside (cycle walking); as the square is at most
    2 sqrt(n) + 1 larger than the range, that is rare. Nothing is stored, whatever the number of samples.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1 or seed < 0:
            raise DataError(f"expected at least one sample and a seed of 0 or more, got {num_samples=}, {seed=}")
        self.num_samples, self.seed = num_samples, seed
        self._side = np.uint64(math.isqrt(num_samples - 1) + 1)

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """Samples at the positions of the epoch's order. positions: int64, any shape, in [0, num_samples)."""
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_samples:
            raise IndexError(
                f"positions {positions.min()} … {positions.max()} are not within 0 … {self.num_samples - 1}"
            )
        round_keys = keys(_ROUNDS, seed=self.seed, epoch=epoch, purpose=ORDER)
        x = self._permute(positions.astype(np.uint64), round_keys)
        while (outside := x >= self.num_samples).any():
            x[outside] = self._permute(x[outside], round_keys)
        return x.astype(np.int64)

    def _permute(self, x: UInt64s, round_keys: UInt64s) -> UInt64s:
        left, right = np.divmod(x, self._side)
        for key in round_keys:
            left, right = right, (left + mix(right + key) % self._side) % self._side
        return left * self._side + right


class BatchPlan:
    """Which samples a rank takes in which step.

    Step t takes the positions [t G, (t+1) G) of the epoch's order, G = batch_size * world_size, and a rank its
    contiguous slice of them: the global batch depends on G alone, not on the number of ranks. Every rank makes
    n // G steps, and no sample comes twice in an epoch; the n % G samples of the tail are others in each epoch.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """Raises DataError when the set does not fill one global batch."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"expected batch_size >= 1 and 0 <= rank < world_size, got {batch_size=}, {rank=}, {world_size=}"
            )
        self.order = EpochOrder(num_samples, seed=seed)
        self.batch_size, self.global_batch = batch_size, batch_size * world_size
        self.steps_per_epoch = num_samples // self.global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"batch too large: {world_size} rank(s) x {batch_size} images = {self.global_batch} a step, but the "
                f"set has {num_samples} images: lower train.batch_size, or use fewer ranks"
            )
        self._slice_B = np.arange(rank * batch_size, (rank + 1) * batch_size, dtype=np.int64)

    def samples(self, epoch: int, step: int) -> Int64s:
        """Sample ids of this rank in this step, int64 (B,)."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step}: expected 0 to {self.steps_per_epoch - 1}")
        return self.order.samples(epoch, self._slice_B + step * self.global_batch)
