"""What a run says of the time that its clusters take."""

from __future__ import annotations

import pytest

from configs.schema import ClusteringConfig
from training.showing.meter import cluster_advice


def _said(cluster_ms: float, budget: float = 0.0) -> str:
    return cluster_advice({"time/cluster_ms": cluster_ms, "time/step_ms": 200.0}, ClusteringConfig(step_budget=budget))


@pytest.mark.parametrize("cluster_ms", [0.0, 5.0, 20.0])
def test_a_tenth_of_a_step_is_not_worth_a_word(cluster_ms: float) -> None:
    assert _said(cluster_ms) == ""


def test_more_is_said_with_the_setting_that_changes_it() -> None:
    said = _said(50.0)
    assert said.startswith("clusters took 25% of the steps' time")
    assert "--set clustering.step_budget=0.05" in said


def test_nothing_is_said_where_the_setting_is_in_use() -> None:
    assert _said(50.0, budget=0.3) == ""
