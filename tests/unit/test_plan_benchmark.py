"""The planner's benchmark: factors that are fitted, cases that are valid trainings, and what its table says."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from benchmarks.planner import CASES, HEADER, cells, planned, pooled
from benchmarks.planning.fit import fit_factors, work_of_step
from configs.load import load_config
from training.plan.planner import Dataset, Scenario, replace
from training.plan.work import Resource

REFERENCE: dict[Resource, float] = dict.fromkeys(get_args(Resource), 1e9)


def _scenarios() -> list[Scenario]:
    """Trainings of a small net, in which different kinds of work are most."""
    _, plain = planned(CASES[3], REFERENCE)
    found = []
    for classes, more in (
        (1000, []),
        (400_000, []),
        (3_000_000, ["head.sample_rate=0.01"]),
        (20_000, ["train.batch_size=2"]),
    ):
        settings = ["model.backbone=small", "train.precision=fp32", "clustering.enabled=false", *more]
        dataset = Dataset(classes=classes, samples=2 * classes)
        found.append(replace(plain, config=load_config(None, settings), dataset=dataset))
    return found


def _rows(slower: dict[Resource, float]) -> list[tuple[Scenario, float, dict[Resource, float]]]:
    return [
        (
            one,
            sum(slower.get(name, 1.0) * amount / REFERENCE[name] for name, amount in work_of_step(one).items()),
            REFERENCE,
        )
        for one in _scenarios()
    ]


def test_factors_are_found() -> None:
    """1 where trainings are as fast as small pieces; lower for the work that is slower."""
    assert list(fit_factors(_rows({})).values()) == pytest.approx([1.0] * 8, abs=1e-6)
    slow = fit_factors(_rows({"head": 3.0}))
    assert slow["head"] < 0.5
    assert slow["contrast"] == slow["head"]
    assert min(value for name, value in slow.items() if name not in ("head", "contrast")) > 0.6


def test_cases_are_told_apart_and_are_trainings() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 10
    assert {case.role for case in CASES} == {"fit", "test"}
    for case in CASES:
        config = load_config(None, case.settings)
        assert case.samples // config.train.batch_size > 2
        assert f"C={case.classes:,} {config.model.backbone} " in case.name


def test_rounds_are_pooled() -> None:
    rounds = [
        {"seconds": [1.0, 9.0, 2.0], "reference": {"head": 4.0}},
        {"seconds": [3.0, 4.0], "reference": {"head": 2.0}},
    ]
    assert pooled({"rounds": rounds}) == (3.0, {"head": 3.0})


@pytest.mark.parametrize(("predicted", "within"), [(70e6, "NO"), (90e6, "yes"), (114e6, "yes"), (120e6, "NO")])
def test_the_table_says_what_is_off(predicted: float, within: str) -> None:
    row = {"for": "test", "configuration": "x", "what": "MB", "predicted": predicted, "measured": 100e6, "limit": 0.15}
    texts = cells(row)
    assert len(texts) == len(HEADER)
    assert texts[-3:] == ("100", f"{np.round(predicted / 100e6, 2):.2f}", within)
