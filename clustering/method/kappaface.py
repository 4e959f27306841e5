"""KappaFace's margins (arXiv 2201.07394), to compare ours with: large for scattered and for small classes.

    r     = |sum z| / n                                 length of the mean of a class's unit embeddings
    kappa = r (D - r^2) / (1 - r^2)                     concentration of a von Mises-Fisher distribution, estimated
    w_k   = 1 - sigmoid(T (kappa - mean) / deviation)   mean and deviation over classes, each counting once
    w_s   = (cos(pi n / n_max) + 1) / 2                 n_max: samples of the largest class
    m     = m0 (0.7 w_k + 0.3 w_s),  T = 0.4

These are the formulas of the paper's first version, as others quote them; the paper itself was not at hand. It gives
the share gamma to w_s and 1 - gamma to w_k; its authors' program gives gamma = 0.7 to w_k. The shares above and T are
the program's. It also divides n by 1.05 n_max, where n_max stands here and in the text.

Ours, where theirs has no value:

- r^2 is had as (1 + (n - 1) rho) / n from the mean cosine over pairs rho: the same for unit rows, without the rounding
  of a bf16 row's own length.
- r = 1, as for one sample or equal ones, means an infinite kappa. Within 2^-10, as far as bf16 can say, it takes the
  largest kappa of the other classes, as in their program; if no class has another, all have the same.
- Equal kappas (a deviation below a millionth of the mean) give w_k = 1/2.
- A class without counted samples has the margin m0 and is left out of mean and deviation.

Kept as theirs though biased: of few samples, r and with it kappa comes out too large (of two orthogonal ones r is
0.71), so that small classes get a smaller w_k than large ones as scattered.

Legend: C classes, all of them, D embedding size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TEMPERATURE = 0.4
_CONCENTRATION_SHARE = 0.7
_UNRESOLVED = 2.0**-10  # 1 - r^2 up to here is bf16 rounding
_EQUAL = 1e-6  # a deviation below this share of the mean is rounding


@torch.no_grad()
def kappaface_margins(rho_C: Tensor, n_C: Tensor, *, dim: int, margin: float) -> Tensor:
    """Margin of each class, float64 (C,), in [0, margin]. Their mean is not `margin`: it depends on the data.

    rho_C: float64, mean cosine over the pairs of distinct samples of a class (any finite one for fewer than two). n_C:
    float64, its counted samples. dim: D. No collective.
    """
    counted_C = n_C > 0
    r2_C = ((1 + (n_C - 1) * rho_C) / n_C.clamp_min(1)).clamp(0, 1)
    resolved_C = counted_C & (1 - r2_C > _UNRESOLVED)
    kappa_C = r2_C.sqrt() * (dim - r2_C) / (1 - r2_C).clamp_min(_UNRESOLVED)
    kappa_C = torch.where(resolved_C, kappa_C, _largest(torch.where(resolved_C, kappa_C, 0.0)))

    classes = counted_C.double().sum().clamp_min(1)
    mean = kappa_C[counted_C].sum() / classes
    deviation = ((kappa_C[counted_C] - mean).square().sum() / classes).sqrt()
    even = deviation <= _EQUAL * mean
    standard_C = torch.where(even, 0.0, (kappa_C - mean) / torch.where(even, 1.0, deviation))

    concentration_C = 1 - torch.sigmoid(_TEMPERATURE * standard_C)
    population_C = (torch.cos(math.pi * n_C / _largest(n_C).clamp_min(1)) + 1) / 2
    share_C = _CONCENTRATION_SHARE * concentration_C + (1 - _CONCENTRATION_SHARE) * population_C
    return torch.where(counted_C, margin * share_C, margin)


def _largest(values_C: Tensor) -> Tensor:
    """Largest value, at least 0; of none, 0."""
    return torch.cat([values_C, values_C.new_zeros(1)]).max()
