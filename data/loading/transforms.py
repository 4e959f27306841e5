"""Augmentation decided before decoding, so that every loader, rank count and resumed run does the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data.order.hashing import FLIP, keys, mix


def flips(samples_B: npt.NDArray[np.int64], *, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Which samples are mirrored left to right in this epoch, one half of them: bool (B,).

    A pure function of (seed, epoch, sample id).
    """
    key = keys(1, seed=seed, epoch=epoch, purpose=FLIP)
    top_bit = mix(samples_B.astype(np.uint64) ^ key) >> np.uint64(63)
    return top_bit.astype(np.bool_)
