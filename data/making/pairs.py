"""Pairs of images for verification: half of one person, half of two, none twice, drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError


class Pairs(NamedTuple):
    """images: int64 (P, 2, 2), of each of two images (identity, image number). same: bool (P,), alternating."""

    images: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]


def draw_pairs(images_per_identity: Sequence[int], count: int, *, seed: int) -> Pairs:
    """Draw `count` pairs; even ones show one person, odd ones two, so that every fold of ten has both.

    Every identity with two images or more gives equally many pairs of one person, while it has any left; pairs of
    two persons take both persons, then their images, evenly. Raises DataError when there are too few images.
    """
    rng = np.random.default_rng([seed, 0x7061697273])  # "pairs": a stream apart from other uses of the seed
    sizes = np.asarray(images_per_identity, np.int64)
    one = _of_one_person(sizes, (count + 1) // 2, rng)
    two = _of_two_persons(sizes, count // 2, rng)
    images = np.empty((count, 2, 2), np.int64)
    images[0::2], images[1::2] = one, two
    return Pairs(images, np.arange(count) % 2 == 0)


def _of_one_person(sizes: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    available = sizes * (sizes - 1) // 2
    if available.sum() < count:
        raise DataError(
            f"expected {count} different pairs of one person, found {available.sum()}: ask for fewer pairs, or give "
            "more identities or images of each"
        )
    # Round r takes the r-th pair of every identity that has one; the last round takes as many as are missing.
    rounds = 0
    while np.minimum(available, rounds).sum() < count:
        rounds += 1
    taken = np.minimum(available, rounds)
    last = rng.permutation(np.flatnonzero(available >= rounds))[: taken.sum() - count]
    taken[last] -= 1
    pairs = []
    for identity in np.flatnonzero(taken):
        for number in rng.choice(available[identity], taken[identity], replace=False):
            second = int((1 + np.sqrt(1 + 8 * float(number))) / 2)  # numbers go (1,0) (2,0) (2,1) (3,0) …
            pairs.append([(identity, number - second * (second - 1) // 2), (identity, second)])
    return rng.permutation(np.array(pairs, np.int64).reshape(-1, 2, 2))


def _of_two_persons(sizes: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    present = np.flatnonzero(sizes)
    available = (int(sizes.sum()) ** 2 - int((sizes**2).sum())) // 2
    if available < 2 * count:  # drawing without repetition stays quick while half of all pairs are left
        raise DataError(
            f"expected to draw {count} pairs of two persons, which needs images for {2 * count}, found {available}: "
            "ask for fewer pairs, or give more identities or images of each"
        )
    drawn: dict[tuple[int, int, int, int], None] = {}
    while len(drawn) < count:
        first, second = sorted(rng.choice(present, 2, replace=False).tolist())
        drawn[first, int(rng.integers(sizes[first])), second, int(rng.integers(sizes[second]))] = None
    return rng.permutation(np.array(list(drawn), np.int64).reshape(-1, 2, 2))
