"""What becomes of the other classes' cosines: nothing, or a function of them that a loss asks for.

A function `cosine_cN -> (value_cN, slope_cN)`: the logit is scale * value, and slope is d value / d cosine.

Legend: N rows of the global batch, c classes of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Negatives(Protocol):
    """A function of the other classes' cosines."""

    @property
    def bound(self) -> float:
        """No value is larger: the softmax's constant shift rests on it."""

    def __call__(self, cosine_cN: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class InterclassFilter:
    """Cosines above the threshold count as 0 and get no gradient, as classes that are the same person under two labels
    would. insightface's option of that name."""

    threshold: float
    bound: float = 1.0

    def __call__(self, cosine_cN: Tensor) -> tuple[Tensor, Tensor]:
        kept_cN = (cosine_cN <= self.threshold).to(cosine_cN.dtype)
        return cosine_cN * kept_cN, kept_cN


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """CurricularFace (arXiv 2004.00288): a cosine above the target's psi becomes cos (t + cos); the others stay.

    t: a scalar in [0, 1] on the device, the running mean of the targets' cosines: hard negatives count for less than
    their cosine at the start of training, for more later.
    """

    t: Tensor
    psi_N: Tensor
    """The target's logit over the scale, of every row, on every rank."""
    bound: float = 2.0

    def __call__(self, cosine_cN: Tensor) -> tuple[Tensor, Tensor]:
        hard_cN = cosine_cN > self.psi_N
        value_cN = torch.where(hard_cN, cosine_cN * (self.t + cosine_cN), cosine_cN)
        return value_cN, torch.where(hard_cN, self.t + 2 * cosine_cN, 1.0)
