"""Randomness as a pure function of what is drawn: no generator, no state, so a resumed run draws the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

ORDER, FLIP, AUGMENT, KEEP, SHUFFLE, CLASSES, MEMBERS, WINDOW, PLACE = range(9)
"""What the numbers are for: each purpose has its own keys."""


def keys(count: int, *, seed: int, epoch: int, purpose: int) -> UInt64s:
    """`count` keys that differ between seeds, epochs and purposes (all >= 0). NumPy keeps this stream stable."""
    return np.asarray(np.random.SeedSequence([seed, epoch, purpose]).generate_state(count, np.uint64), np.uint64)


def mix(x: UInt64s) -> UInt64s:
    """Scramble 64-bit numbers, one to one: the finaliser of splitmix64 (Steele, Lea, Flood 2014, variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
