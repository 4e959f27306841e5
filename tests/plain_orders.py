"""The orders by class once more: whole numbers of Python, one position at a time."""

from __future__ import annotations

import math

from data.order.hashing import CLASSES, MEMBERS, keys
from data.order.permutation import ROUNDS

_WORD = 2**64


def _plain_mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % _WORD
    return x ^ x >> 31


def plain_permute(place: int, size: int, purpose: int, seed: int, epoch: int, numbers: tuple[int, ...]) -> int:
    round_keys = keys(ROUNDS, seed=seed, epoch=epoch, purpose=purpose).tolist()
    if numbers:
        tag = 0
        for number in numbers:
            tag = _plain_mix((tag + number + 0x9E3779B97F4A7C15) % _WORD)
        round_keys = [_plain_mix((tag + key) % _WORD) for key in round_keys]
    side = math.isqrt(size - 1) + 1
    x = place
    while True:
        left, right = divmod(x, side)
        for key in round_keys:
            left, right = right, (left + _plain_mix((right + key) % _WORD) % side) % side
        x = left * side + right
        if x < size:
            return x


def by_class(labels: list[int], samples: list[int]) -> dict[int, list[int]]:
    """The samples of each class, in the order in which they come."""
    found: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for sample in samples:
        found[labels[sample]].append(sample)
    return found


def plain_balanced(labels: list[int], seed: int, epoch: int) -> list[int]:
    classes = list(by_class(labels, list(range(len(labels)))).values())
    rounds, samples = len(labels) // len(classes), []
    for position in range(len(labels)):
        turn, place = divmod(position, len(classes))
        chosen = plain_permute(place, len(classes), CLASSES, seed, epoch, (turn,))
        size = len(classes[chosen])
        sweep, day = divmod(epoch, math.ceil(size / rounds))
        at = (day * rounds + turn) % size
        samples.append(classes[chosen][plain_permute(at, size, MEMBERS, seed, 0, (chosen, sweep, turn // size))])
    return samples


def plain_identities(labels: list[int], seed: int, epoch: int, K: int) -> list[int]:
    classes = list(by_class(labels, list(range(len(labels)))).values())
    groups = [(c, first) for c, members in enumerate(classes) for first in range(0, len(members), K)]
    samples = []
    for place in range(len(groups)):
        c, first = groups[plain_permute(place, len(groups), CLASSES, seed, epoch, ())]
        size = len(classes[c])
        for at in range(first, first + K):
            samples.append(classes[c][plain_permute(at % size, size, MEMBERS, seed, epoch, (c,))])
    return samples
