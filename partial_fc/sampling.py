"""Which class centres take part in a step when `sample_rate` is below 1 (Partial FC, arXiv 2203.15565).

Classes that the global batch names always do. Of the others a share is drawn, the same classes for any number of
ranks: every class has a score, a hash of (seed, step, class), and of each block of classes those of least score are
drawn, as many as the rate asks for up to a rounding by lot. Blocks let every rank draw for its own classes without a
word to the others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sharding import Shard

_BLOCK = 1024
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # as int64 holds them


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by without the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _scores(classes: Tensor, key: int) -> Tensor:
    """int64, one to one: the finaliser of splitmix64 (Steele, Lea, Flood 2014, variant 13) after a 64-bit key."""
    x = classes ^ (key - (1 << 64) if key >> 63 else key)
    for multiplier, shift in zip(_MULTIPLIERS, (30, 27), strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def drawn_classes(
    shard: Shard, num_classes: int, sample_rate: float, *, seed: int, step: int, device: torch.device
) -> Tensor:
    """Whether each class of the shard is drawn, bool (shard.size,): each with the chance `sample_rate`.

    Over all shards floor(sample_rate x num_classes + u) are, with u in [0, 1) drawn for the step. A pure function of
    (class, num_classes, sample_rate, seed, step). No collective, no host sync.
    """
    key, lot = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64).tolist()
    first, last = shard.start // _BLOCK, -(-shard.stop // _BLOCK)
    class_bK = torch.arange(first * _BLOCK, last * _BLOCK, device=device).view(-1, _BLOCK)
    score_bK = _scores(class_bK, key)
    beyond = torch.iinfo(torch.int64).max
    score_bK.masked_fill_(class_bK >= num_classes, beyond)
    # Blocks take what brings the number drawn so far to the share of the classes so far, rounded by the step's lot: a
    # fixed rounding would favour some blocks for ever.
    ends = np.minimum(np.arange(first, last + 1, dtype=np.int64) * _BLOCK, num_classes)
    wanted = np.diff(np.floor(sample_rate * ends + lot / 2**64).astype(np.int64))
    if not len(wanted) or not wanted.max():
        return torch.zeros(shard.size, dtype=torch.bool, device=device)
    least_bW = score_bK.topk(int(wanted.max()), dim=1, largest=False, sorted=True).values
    wanted_b1 = torch.from_numpy(wanted).to(device, non_blocking=True)[:, None]
    limit_b1 = least_bW.gather(1, (wanted_b1 - 1).clamp_min(0))
    drawn_bK = (score_bK <= limit_b1) & (wanted_b1 > 0)
    return drawn_bK.view(-1)[shard.start - first * _BLOCK : shard.stop - first * _BLOCK]


def sample_rows(
    positive_N: Tensor, shard: Shard, num_classes: int, sample_rate: float, *, seed: int, step: int
) -> Tensor:
    """Sorted rows of the shard that take part: those drawn, and those that the global batch names.

    positive_N: int64, row of this shard that holds a label's centre, -1 for none; duplicates are welcome. Returns
    int64 (S,) on positive_N's device. No collective; one host sync, which sizes the result.
    """
    drawn = drawn_classes(shard, num_classes, sample_rate, seed=seed, step=step, device=positive_N.device)
    taken = torch.cat([drawn, drawn.new_zeros(1)])  # one place more, for the rows that lie elsewhere
    taken[torch.where(positive_N >= 0, positive_N, shard.size)] = True
    return taken[:-1].nonzero()[:, 0]
