"""Permutations of any sizes at once, each with keys of its own."""

from __future__ import annotations

import numpy as np

from data.order.hashing import MEMBERS, keys
from data.order.permutation import ROUNDS, own_keys, permute


def test_permutations_of_all_sizes_at_once() -> None:
    sizes = np.repeat(np.arange(1, 120), np.arange(1, 120)).astype(np.uint64)
    places = np.concatenate([np.arange(n) for n in range(1, 120)]).astype(np.uint64)
    base = keys(ROUNDS, seed=1, epoch=2, purpose=MEMBERS)
    out = permute(places, sizes, own_keys(base, sizes))
    for n in range(1, 120):
        assert sorted(out[sizes == n].tolist()) == list(range(n))


def test_keys_differ_with_each_number_and_its_place() -> None:
    base = keys(ROUNDS, seed=1, epoch=2, purpose=MEMBERS)
    first, second = (numbers.ravel() for numbers in np.indices((40, 40), np.uint64))
    own = own_keys(base, first, second)
    assert own.shape == (1600, ROUNDS)
    assert len(np.unique(own)) == own.size
    assert not np.isin(own_keys(base, first), own).any()
