"""Paired comparisons: the same seeds, hence the same training sets, under two arms.

Legend: n pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against another, over paired seeds."""

    mean: float
    """Mean difference."""
    low: float
    """95% interval of the mean difference, Student's t."""
    high: float
    p: float
    """Two-sided, Wilcoxon's signed ranks, exact."""


def compare(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """Raises ValueError for fewer than two pairs or lengths that differ."""
    if len(values) != len(others) or len(values) < 2:
        raise ValueError(f"expected pairs, two or more, got {len(values)} and {len(others)} values")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    p = float(stats.wilcoxon(differences, zero_method="pratt").pvalue) if differences.any() else 1.0
    return Comparison(mean, mean - half, mean + half, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: adjusted p of each hypothesis, in the order given."""
    adjusted, so_far = {}, 0.0
    ascending = sorted(p_values.items(), key=lambda item: item[1])
    for place, (name, p) in enumerate(ascending):
        so_far = max(so_far, min(1.0, (len(ascending) - place) * p))
        adjusted[name] = so_far
    return {name: adjusted[name] for name in p_values}
