"""A limit on the time of refreshes: measured, agreed on by all ranks, kept over a resume; and a start from a file."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clustering.service import pace
from clustering.service.pace import Plan, plan_refresh
from clustering.service.service import ClusterService
from configs.schema import ConfigError
from tests.dist.clustering_cases import CASES, by_sample, problem
from tests.dist.service_cases import EPOCH, NOISY, STEPS, build, train
from tests.ranks import WORLD_SIZES, RankPool


class _Clock:
    """Stands for the clock: a step takes one second, a slice `cost` seconds more on the last rank than on others."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost, self.slices = 0.0, cost, 0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self.slices += 1

    def take(self) -> float:
        slices, self.slices = self.slices, 0
        return slices * self.cost


# The first refresh costs twice `cost`, the second a little less, as it starts from centres; half a second a step is
# allowed. 2 x 0.6 s need three steps, 2 x 1.2 s more than the four there are; one iteration of it takes about 1.3 s.


def _limited(group: dist.ProcessGroup, cost: float, resume_after: int) -> tuple[list[Any], Plan]:
    """After each step: version, and the plan of the refresh under way; and the plan that the second should have."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    clock = _Clock(cost if last else cost / 3)
    pace.time = SimpleNamespace(perf_counter=clock.perf_counter)  # type: ignore
    try:
        service = build(group, NOISY, step_budget=0.5, stopwatch=clock)
        found: list[Any] = []
        expected = Plan(steps=2, iterations=2)
        for step in range(STEPS):
            if step == resume_after:
                state, service = service.state_dict(), build(group, NOISY, step_budget=0.5, stopwatch=clock)
                service.load_state_dict(state)
            train(service, NOISY, start=step, stop=step + 1)
            refresh = service._refresh
            found.append((service.version, refresh and (refresh.plan.steps, refresh.plan.iterations)))
            if step + 1 == EPOCH:
                assert refresh is not None
                # Two steps did slices, each timed as a whole: `cost` for each of them.
                expected = plan_refresh(
                    Plan(steps=2, iterations=2),
                    longest=EPOCH,
                    fixed=refresh.slices[0] - _slices_of_start(service),
                    per_iteration=refresh.slices[1],
                    slice_seconds=2 * cost / refresh.length,
                    allowed=0.5,
                )
            if refresh is not None:
                said = service.statistics(step + 1)
                assert said["clusters/refresh_steps"] == refresh.plan.steps
                assert said["clusters/refresh_iterations"] == refresh.plan.iterations
    finally:
        pace.time = time  # type: ignore[attr-defined]
    return found, expected


def _slices_of_start(service: ClusterService) -> int:
    """Slices that only the first refresh has: the means it starts from."""
    assert service._refresh is not None
    run = service._refresh.run
    return run.length - 2 * run.slices_of_an_iteration


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("cost", "steps", "iterations"),
    [(0.1, 2, 2), (0.6, 3, 2), (1.2, 3, 1), (1000.0, 4, 1)],
    ids=["within", "spread longer", "an iteration less", "the least there is"],
)
def test_a_slow_refresh_is_spread_longer_then_cut(
    ranks: RankPool, world_size: int, cost: float, steps: int, iterations: int
) -> None:
    parts = [ranks.run(world_size, _limited, cost, resume_after) for resume_after in (STEPS, 9)]
    for found, expected in (part for both in parts for part in both):
        assert found == parts[0][0][0], "all ranks alike, resumed or not"
        assert found[EPOCH - 1] == (0, (2, 2)), "nothing is measured yet"
        assert found[2 * EPOCH - 1] == (1, (steps, iterations))
        assert Plan(steps=steps, iterations=iterations) == expected
        versions = [version for version, _ in found]
        assert versions[2 * EPOCH + steps - 2 : 2 * EPOCH + steps] == [1, 2], "published at the end of the plan"
        assert versions[-1] >= 2


def _without_stopwatch(group: dist.ProcessGroup) -> str:
    with pytest.raises(ValueError, match="stopwatch: expected one") as error:
        build(group, NOISY, step_budget=0.1)
    return str(error.value)


def test_a_limit_needs_a_stopwatch(ranks: RankPool) -> None:
    assert "clustering.step_budget" in ranks.run(1, _without_stopwatch)[0]


# ---- the start from a file -------------------------------------------------------------------------------------


def _started(group: dist.ProcessGroup, path: str, dtype: torch.dtype) -> dict[str, Any]:
    service = build(group, NOISY, start=path, bank_dtype=dtype)
    train(service, NOISY, stop=2 * EPOCH)
    service._published = None  # as if it had failed: the next one starts from the file too
    refresh = service._new_refresh()
    while refresh.run.kind_of_next == "mean":
        refresh.advance()
    points = service.bank.points()
    return {"x": (points.sample_P, points.x_PD), "centres": refresh.run.centres_SD}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_first_refresh_starts_from_the_means_of_the_given_clusters(
    ranks: RankPool, world_size: int, tmp_path: Path
) -> None:
    """In the present embeddings: the job may have seen others."""
    _, labels_N, _, K = problem(NOISY)
    cluster_N = (labels_N * 7 + torch.arange(len(labels_N)) % 3) % (K - 1)  # the last cluster has no sample
    cluster_N[5] = -1
    np.save(tmp_path / "a.npy", cluster_N.numpy().astype(np.int32))
    parts = ranks.run(world_size, _started, str(tmp_path / "a.npy"), torch.float64)
    x_ND = by_sample([part["x"] for part in parts], len(labels_N))
    found_KD = torch.cat([part["centres"] for part in parts])
    truth_KD = torch.stack([x_ND[cluster_N == k].sum(0) for k in range(K)])
    assert torch.allclose(found_KD, F.normalize(truth_KD), atol=1e-11)
    assert (found_KD[-1] == 0).all()


def _wholly(group: dist.ProcessGroup, path: str) -> tuple[int, dict[str, float]]:
    service = build(group, CASES["even"], start=path)
    train(service, CASES["even"])
    return service.version, service.statistics(STEPS)


def test_training_goes_on_from_a_start(ranks: RankPool, tmp_path: Path) -> None:
    labels_N = problem(CASES["even"])[1]
    np.save(tmp_path / "a.npy", labels_N.numpy())
    assert ranks.run(2, _wholly, str(tmp_path / "a.npy")) == ranks.run(2, _wholly, "")
    np.save(tmp_path / "b.npy", np.full(len(labels_N), -1))
    version, statistics = ranks.run(2, _wholly, str(tmp_path / "b.npy"))[0]
    assert version == 3
    assert all(np.isfinite(value) for value in statistics.values())


def _refused(group: dist.ProcessGroup, path: str) -> str:
    with pytest.raises(ConfigError) as error:
        build(group, NOISY, start=path)
    return str(error.value)


def test_a_start_of_too_many_clusters_says_how_to_make_it(ranks: RankPool, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(90) % 13)
    for said in ranks.run(2, _refused, str(tmp_path / "a.npy")):
        assert "expected at most 11 clusters" in said
        assert "got 13: make it with --k 11, or raise clustering.extra_clusters" in said
