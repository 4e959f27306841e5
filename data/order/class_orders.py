"""Orders of the samples that go by class: every class equally often, or groups of images of one identity.

Both are pure functions of (seed, epoch, position), as the plain shuffle is: a resumed run, and any number of ranks,
gets the same sequence.

Legend: N samples, C classes that have any, n_c samples of one, K images of a group, P positions asked for.
"""

from __future__ import annotations

import numpy as np

from data.errors import DataError
from data.order.hashing import CLASSES, MEMBERS, UInt64s, keys
from data.order.permutation import ROUNDS, own_keys, permute
from data.order.sampler import Int64s, Order, check_positions


class ClassIndex:
    """The samples of each class, side by side: N + 2 C numbers of 64 bits. Classes without samples are left out."""

    def __init__(self, labels_N: Int64s) -> None:
        """labels_N: the class of every sample. Raises DataError when there is none, or a negative one."""
        if not len(labels_N) or labels_N.min() < 0:
            raise DataError(
                f"expected at least one sample, and classes of 0 or more, got {len(labels_N)} samples"
                + (f" and class {labels_N.min()}" if len(labels_N) else "")
            )
        counts = np.bincount(labels_N)
        self.sizes_C: Int64s = counts[counts > 0].astype(np.int64)
        self._starts_C = np.cumsum(self.sizes_C) - self.sizes_C
        self._samples_N: Int64s = np.argsort(labels_N, kind="stable")

    def samples(self, class_P: Int64s, place_P: Int64s) -> Int64s:
        """The samples at these places of these classes, in [0, n_c)."""
        samples_P: Int64s = self._samples_N[self._starts_C[class_P] + place_P]
        return samples_P


class BalancedOrder(Order):
    """Every class equally likely. An epoch has N positions, in rounds of C, in each of which every class comes once.

    The rounds' orders differ. A class's r-th image of an epoch is that of round r:

    - n_c at most R = N // C, the full rounds: the class is gone through again and again, each time in another order;
    - more: an epoch does not reach them all, and the next one goes on where it ends. After ceil(n_c / R) epochs, a
      sweep, all have come, and another order begins.

    So an image comes a second time in an epoch only when all of its class have come.
    """

    group = 1

    def __init__(self, index: ClassIndex, *, seed: int) -> None:
        _check_seed(seed)
        self.seed, self.num_positions = seed, int(index.sizes_C.sum())
        self._index, self._classes = index, len(index.sizes_C)
        self._rounds = self.num_positions // self._classes
        self._sweep_C = -(-index.sizes_C // self._rounds)
        # Not of an epoch: a sweep is longer.
        self._member_keys = keys(ROUNDS, seed=seed, epoch=0, purpose=MEMBERS)

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """See `data.order.sampler.Order`."""
        check_positions(positions, self.num_positions)
        round_P, place_P = np.divmod(positions, self._classes)
        round_keys = keys(ROUNDS, seed=self.seed, epoch=epoch, purpose=CLASSES)
        class_P = _permuted(place_P, np.int64(self._classes), round_keys, round_P)
        size_P = self._index.sizes_C[class_P]
        sweep_P, day_P = np.divmod(epoch, self._sweep_C[class_P])
        place_P = (day_P * self._rounds + round_P) % size_P
        image_P = _permuted(place_P, size_P, self._member_keys, class_P, sweep_P, round_P // size_P)
        return self._index.samples(class_P, image_P)


class IdentityOrder(Order):
    """Groups of K images of one identity (P x K): positions [i K, (i + 1) K) are the i-th group.

    A class has ceil(n_c / K) groups in an epoch, and the groups of all classes come in one shuffled order. They deal
    out the class's images, shuffled: each comes once; the last group is filled up from the first. So the images of a
    group are K different ones, or, where n_c < K, all of them, nearly equally often.
    """

    def __init__(self, index: ClassIndex, *, images_per_identity: int, seed: int) -> None:
        _check_seed(seed)
        if images_per_identity < 1:
            raise DataError(f"expected images_per_identity of 1 or more, got {images_per_identity}")
        self.seed, self.group = seed, images_per_identity
        self._index = index
        groups_C = -(-index.sizes_C // self.group)
        self._ends_C = np.cumsum(groups_C)
        self._starts_C = self._ends_C - groups_C
        self._groups = int(self._ends_C[-1])
        self.num_positions = self._groups * self.group

    def samples(self, epoch: int, positions: Int64s) -> Int64s:
        """See `data.order.sampler.Order`."""
        check_positions(positions, self.num_positions)
        group_P, member_P = np.divmod(positions, self.group)
        group_keys, member_keys = (
            keys(ROUNDS, seed=self.seed, epoch=epoch, purpose=purpose) for purpose in (CLASSES, MEMBERS)
        )
        group_P = _permuted(group_P, np.int64(self._groups), group_keys)
        class_P = np.searchsorted(self._ends_C, group_P, side="right")
        size_P = self._index.sizes_C[class_P]
        place_P = ((group_P - self._starts_C[class_P]) * self.group + member_P) % size_P
        return self._index.samples(class_P, _permuted(place_P, size_P, member_keys, class_P))


def _permuted(place_P: Int64s, size_P: Int64s | np.int64, round_keys: UInt64s, *numbers_P: Int64s) -> Int64s:
    """`permute` of whole numbers, with keys of their own for each tuple of `numbers_P`, if there are any."""
    if numbers_P:
        round_keys = own_keys(round_keys, *(number_P.astype(np.uint64) for number_P in numbers_P))
    return permute(place_P.astype(np.uint64), size_P.astype(np.uint64), round_keys).astype(np.int64)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise DataError(f"expected a seed of 0 or more, got {seed}")
