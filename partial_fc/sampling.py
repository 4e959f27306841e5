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

from partial_fc.tiles import SampledRows
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
    return _drawn(shard, num_classes, *_lots(shard, num_classes, sample_rate, seed=seed, step=step), device)


def _drawn(shard: Shard, num_classes: int, key: int, wanted: np.ndarray, device: torch.device) -> Tensor:
    if not len(wanted) or not wanted.max():
        return torch.zeros(shard.size, dtype=torch.bool, device=device)
    first = shard.start // _BLOCK
    class_bK = torch.arange(first * _BLOCK, (first + len(wanted)) * _BLOCK, device=device).view(-1, _BLOCK)
    score_bK = _scores(class_bK, key)
    score_bK.masked_fill_(class_bK >= num_classes, torch.iinfo(torch.int64).max)
    least_bW = score_bK.topk(int(wanted.max()), dim=1, largest=False, sorted=True).values
    wanted_b1 = torch.from_numpy(wanted).to(device, non_blocking=True)[:, None]
    limit_b1 = least_bW.gather(1, (wanted_b1 - 1).clamp_min(0))
    drawn_bK = (score_bK <= limit_b1) & (wanted_b1 > 0)
    return drawn_bK.view(-1)[shard.start - first * _BLOCK : shard.stop - first * _BLOCK]


def _lots(shard: Shard, num_classes: int, sample_rate: float, *, seed: int, step: int) -> tuple[int, np.ndarray]:
    """The step's key, and how many classes each of the shard's blocks draws, int64.

    Blocks take what brings the number drawn so far to the share of the classes so far, rounded by the step's lot: a
    fixed rounding would favour some blocks for ever.
    """
    key, lot = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64).tolist()
    first, last = shard.start // _BLOCK, -(-shard.stop // _BLOCK)
    ends = np.minimum(np.arange(first, last + 1, dtype=np.int64) * _BLOCK, num_classes)
    return key, np.diff(np.floor(sample_rate * ends + lot / 2**64).astype(np.int64))


def sample_rows(
    positive_M: Tensor, shard: Shard, num_classes: int, sample_rate: float, *, seed: int, step: int
) -> SampledRows:
    """The classes of the shard that take part: those drawn, and those named.

    positive_M: int64, class of this shard (from 0), -1 for none; duplicates are welcome. No collective and no host
    sync: how many there are is not looked at, so that there may be padding at the end.
    """
    key, wanted = _lots(shard, num_classes, sample_rate, seed=seed, step=step)
    drawn = _drawn(shard, num_classes, key, wanted, positive_M.device)
    taken = torch.cat([drawn, drawn.new_zeros(1)])  # one place more, for the classes that lie elsewhere
    taken.index_fill_(0, torch.where(positive_M >= 0, positive_M, shard.size), True)  # "[…] = True" waits for a GPU
    # A block that another shard has part of draws an unknown number here.
    cut = [shard.start % _BLOCK, shard.stop % _BLOCK if shard.stop < num_classes else 0]
    whole = wanted[bool(cut[0]) : len(wanted) - bool(cut[1])]
    most = min(shard.size, int(wanted.sum()) + len(positive_M))
    rows_S = torch.nonzero_static(taken[:-1], size=most, fill_value=shard.size)[:, 0]
    return SampledRows(rows_S, int(whole.sum()), key)
