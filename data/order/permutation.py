"""Permutations that need no memory: each of any size, with keys of its own, computed at the places asked for."""

from __future__ import annotations

import numpy as np

from data.order.hashing import UInt64s, mix

ROUNDS = 8
"""Four rounds make a Feistel network a pseudorandom permutation (Luby, Rackoff 1988) when its halves are large;
here they hold sqrt(n) values only. With eight, pairs of samples are uniform over pairs of places from n = 2 on."""

_STEP = np.uint64(0x9E3779B97F4A7C15)  # as `mix` leaves 0 what it is


def own_keys(round_keys: UInt64s, *numbers: UInt64s) -> UInt64s:
    """Keys of a permutation for each tuple of numbers, uint64 (..., ROUNDS). numbers: of one shape (...).

    round_keys: (ROUNDS,), of all of them.
    """
    tag = np.zeros_like(numbers[0])
    for number in numbers:
        tag = mix(tag + number + _STEP)
    return mix(tag[..., None] + round_keys)


def permute(places: UInt64s, sizes: UInt64s | np.uint64, round_keys: UInt64s) -> UInt64s:
    """What stands at each place, one to one within [0, size). places: below their size, any shape (...).

    sizes: one for all, or (...). round_keys: (ROUNDS,) for all, or (..., ROUNDS).

    A Feistel network over the square a * a >= n, a = ceil(sqrt(n)), whose halves add modulo a. A value outside the
    range is sent through again until it lands inside (cycle walking); as the square is at most 2 sqrt(n) + 1 larger
    than the range, that is rare.
    """
    sizes_here = np.broadcast_to(sizes, places.shape)
    keys_here = np.broadcast_to(round_keys, (*places.shape, ROUNDS))
    x = _network(places, sizes_here, keys_here)
    while (outside := x >= sizes_here).any():
        x[outside] = _network(x[outside], sizes_here[outside], keys_here[outside])
    return x


def _network(places: UInt64s, sizes: UInt64s, round_keys: UInt64s) -> UInt64s:
    # Exact below 2^52; above, rounding may make the square larger than it need be, never too small.
    side = np.sqrt(sizes - np.uint64(1)).astype(np.uint64) + np.uint64(1)
    left, right = np.divmod(places, side)
    for key in np.moveaxis(round_keys, -1, 0):
        left, right = right, (left + mix(right + key) % side) % side
    x: UInt64s = left * side + right
    return x
