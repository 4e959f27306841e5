"""Factors of a CPU: how much of a small piece's speed a training reaches at work of its kind.

Seconds of a step are a sum over resources of work over (factor x reference). Non-negative least squares on relative
errors, so that a short step counts as much as a long one; resources that no row uses keep 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from training.plan import work
from training.plan.planner import Scenario
from training.plan.work import Resource, Work

_TIED: dict[Resource, Resource] = {"contrast": "head"}
"""The same kind of products."""
_PRIOR = 0.3
"""How much a factor of 1 is worth against a row: few rows, many factors."""


def work_of_step(scenario: Scenario) -> Work:
    """All of a step on one rank, a refresh shared out."""
    config, sizes, device = scenario.config, scenario.sizes, scenario.device
    forward, update = work.of_head(config, sizes, device)
    total: Work = {}
    parts = [
        work.of_backbone(config, sizes),
        forward,
        update,
        work.of_optimizer(config, device),
        work.of_cluster_losses(config, sizes, device),
    ]
    interval = max(1, sizes.samples // scenario.images)
    parts.append({name: amount / interval for name, amount in work.of_refresh(config, sizes).items()})
    for part in parts:
        for name, amount in part.items():
            tied = _TIED.get(name, name)
            total[tied] = total.get(tied, 0.0) + amount
    return total


def fit_factors(rows: Sequence[tuple[Scenario, float, dict[Resource, float]]]) -> dict[Resource, float]:
    """rows: a scenario, seconds of its step, and the rates of small pieces. A factor of 1 means: as fast as these."""
    works = [work_of_step(scenario) for scenario, _, _ in rows]
    names: list[Resource] = sorted({name for one in works for name in one})
    matrix, goal = [], []
    for one, (_, step, reference) in zip(works, rows, strict=True):
        matrix.append([one.get(name, 0.0) / reference[name] / step for name in names])
        goal.append(1.0)
    for number in range(len(names)):
        matrix.append([_PRIOR * (column == number) for column in range(len(names))])
        goal.append(_PRIOR)
    inverse, _ = nnls(np.array(matrix), np.array(goal))
    found: dict[Resource, float] = {
        name: float(1 / max(value, 1e-3)) for name, value in zip(names, inverse, strict=True)
    }
    return found | {name: found[tied] for name, tied in _TIED.items() if tied in found}
