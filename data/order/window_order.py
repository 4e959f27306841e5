"""An order for records that are far away or on slow disks: a shuffle that reads few places of the files at a time."""

from __future__ import annotations

import numpy as np

from data.errors import DataError
from data.order.hashing import ORDER, PLACE, WINDOW, keys
from data.order.permutation import ROUNDS, own_keys, permute
from data.order.sampler import Int64s, Order, check_positions

RUN = 1024
"""Neighbouring samples that come into the same window: some 8 MB."""


class WindowOrder(Order):
    """Runs of neighbouring samples in a random order, and the samples of a window of runs shuffled together.

    Every sample comes once an epoch. A pure function of (seed, epoch, position), like the plain shuffle, but a window
    of positions reads window / RUN runs of the files only, and those of the next window can be got meanwhile. Where the
    first run begins is drawn as well, so that runs differ between epochs, and the last one, which may be short and
    comes last, is another each time.
    """

    group = 1

    def __init__(self, num_samples: int, *, window: int, seed: int) -> None:
        """window: positions, some runs."""
        if num_samples < 1 or seed < 0 or window < 1:
            raise DataError(
                f"expected at least one sample, a seed of 0 or more and a window of 1 or more, got {num_samples=}, "
                f"{seed=}, {window=}"
            )
        self.num_positions, self.seed, self.window = num_samples, seed, window

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """See `data.order.sampler.Order`."""
        check_positions(positions, self.num_positions)
        window = positions // self.window
        begin = window * self.window
        size = np.minimum(self.num_positions - begin, self.window).astype(np.uint64)
        window_keys = own_keys(keys(ROUNDS, seed=self.seed, epoch=epoch, purpose=WINDOW), window.astype(np.uint64))
        place = permute((positions - begin).astype(np.uint64), size, window_keys).astype(np.int64)
        return self._in_runs(epoch, begin + place)

    def coming(self, epoch: int, step: range, mine: Int64s, *, first: bool) -> Int64s:
        """See `data.order.sampler.Order`: so many of the next window; with the first step all up to there."""
        ahead = np.arange(step.start, step.stop) + self.window
        if first:
            begin = step.start // self.window * self.window
            ahead = np.arange(begin, step.stop + self.window)
        return self._in_runs(epoch, ahead[ahead < self.num_positions])

    def _in_runs(self, epoch: int, places: Int64s) -> Int64s:
        """The samples in the order of the runs."""
        whole = max(1, self.num_positions // RUN)
        run, within = np.divmod(places, RUN)
        shuffled = run.copy()
        inside = run < whole  # the rest is no whole run
        round_keys = keys(ROUNDS, seed=self.seed, epoch=epoch, purpose=ORDER)
        shuffled[inside] = permute(run[inside].astype(np.uint64), np.uint64(whole), round_keys).astype(np.int64)
        first = int(keys(1, seed=self.seed, epoch=epoch, purpose=PLACE)[0] % np.uint64(self.num_positions))
        return (shuffled * RUN + within + first) % self.num_positions
