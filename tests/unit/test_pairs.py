"""Verification pairs: balanced, none twice, of the right persons, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.making.pairs import draw_pairs


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=2, max_size=9), count=st.integers(2, 60), seed=st.integers(0, 2**63))
def test_pairs_are_valid_or_refused(sizes: list[int], count: int, seed: int) -> None:
    one_person = sum(size * (size - 1) // 2 for size in sizes)
    two_persons = (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
    if one_person < (count + 1) // 2 or two_persons < 2 * (count // 2):
        with pytest.raises(DataError, match="ask for fewer pairs"):
            draw_pairs(sizes, count, seed=seed)
        return
    images, same = draw_pairs(sizes, count, seed=seed)
    assert images.shape == (count, 2, 2)
    assert same.tolist() == [number % 2 == 0 for number in range(count)]
    assert ((images[:, 0, 0] == images[:, 1, 0]) == same).all()
    assert all(0 <= image < sizes[identity] for identity, image in images.reshape(-1, 2).tolist())
    assert len({frozenset(map(tuple, pair)) for pair in images.tolist()}) == count, (
        "no pair twice, no image with itself"
    )
    again = draw_pairs(sizes, count, seed=seed)
    np.testing.assert_array_equal(again.images, images)
    used = np.bincount(images[same][:, 0, 0], minlength=len(sizes))
    left = [size * (size - 1) // 2 - number for size, number in zip(sizes, used, strict=True)]
    assert min(used[np.array(left) > 0], default=used.max()) >= used.max() - 1, "identities give evenly"


def test_seeds_differ() -> None:
    first, second = (draw_pairs([20] * 50, 500, seed=seed).images for seed in (0, 1))
    assert (first != second).any(axis=(1, 2)).mean() > 0.9
