"""Which class centres of a shard take part in a step when `sample_rate` is below 1 (Partial FC).

Classes that are present in the global batch always do; the rest of the quota is drawn uniformly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sample_rows(positive_rows: Tensor, num_rows: int, sample_rate: float, *, seed: int, step: int, rank: int) -> Tensor:
    """Sorted distinct rows of the shard: all positives, and uniformly drawn others up to the quota.

    positive_rows: int64, rows of this shard that the global batch names; duplicates are welcome. num_rows: rows
    of the shard. The quota is ceil(sample_rate * num_rows), or the number of positives if that is larger.
    A pure function of its arguments, so a resumed run draws what the first would have drawn.
    Returns int64 (S,), S <= num_rows, on positive_rows' device. No collective.
    """
    quota = -int(-sample_rate * num_rows // 1)
    # The CPU generator takes 32 bits of its seed only: hash everything into them.
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    generator = torch.Generator(positive_rows.device).manual_seed(mixed)
    score = torch.rand(num_rows, generator=generator, device=positive_rows.device)
    score[positive_rows] = 2.0  # above every random score, so positives are always among the largest
    positives = int((score == 2.0).sum())
    return score.topk(min(num_rows, max(quota, positives)), sorted=False).indices.sort().values
