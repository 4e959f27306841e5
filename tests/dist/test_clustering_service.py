"""The cluster service end to end beside a small training: the same on any number of ranks, plain until it guides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import HeadConfig
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from tests.dist.clustering_cases import CASES, Case
from tests.dist.service_cases import NOISY, STEPS, batch_at, build, snapshot, train, trained, weights
from tests.ranks import WORLD_SIZES, RankPool

# ---- any number of ranks ---------------------------------------------------------------------------------------


def _history(group: dist.ProcessGroup, case: Case, wanted: dict[str, Any]) -> dict[str, Any]:
    """Scalars of every step, and the whole state at the end."""
    service = build(group, case, **wanted)
    w_RD = weights(service)
    scalars: list[list[float]] = []

    def look(step: int, batch: GatheredBatch) -> None:
        losses = (service.contrastive(batch), service.alignment(batch, w_RD))
        row_margins_N = service.row_margins(batch).double()
        owned_N = (batch.labels_N >= service.classes.start) & (batch.labels_N < service.classes.stop)
        assert (row_margins_N[~owned_N] == 0.5).all()
        owned = float(row_margins_N[owned_N].sum())
        scalars.append([service.version, service.ramp(step), *(float(loss) for loss in losses), owned])
        assert service.ramp(step) == service.schedule.ramp(step), "published before the ramp begins"

    train(service, case, each=look)
    return {"scalars": scalars, **snapshot(service), "log": service.statistics(STEPS)}


RUNS: dict[str, tuple[Case, dict[str, Any]]] = {
    **{name: (CASES[name], {}) for name in CASES if name not in {"even", "not all seen", "one sample a class"}},
    "ungated": (NOISY, {"noise_gate": False, "direction": -1}),
    "drifting, a refresh in one step": ({**NOISY, "drift": 0.02}, {"refresh_span": 0.01}),
}


@pytest.mark.parametrize("name", RUNS)
def test_one_rank_equals_many_and_all_is_finite(ranks: RankPool, name: str) -> None:
    (one,) = ranks.run(1, _history, *RUNS[name])
    assert one["version"] == 3
    assert len(one["scalars"]) == STEPS
    for kind in ("by_cluster", "by_class", "whole"):
        for key, values in one[kind].items():
            assert torch.isfinite(values).all(), key
    margins_C, hard_C = one["by_class"]["margins"], one["by_class"]["hard"]
    assert ((margins_C >= 0.35) & (margins_C <= 0.65)).all()
    assert ((hard_C >= 0) & (hard_C <= 1)).all()
    for world_size in WORLD_SIZES[1:]:
        parts = ranks.run(world_size, _history, *RUNS[name])
        for part in parts:
            assert part["version"] == one["version"]
            for key, values in one["whole"].items():
                assert torch.allclose(part["whole"][key], values, rtol=0, atol=1e-7), key
            assert part["log"] == parts[0]["log"], "ranks log the same bits"
            assert part["log"] == pytest.approx(one["log"], abs=1e-9)
            for column, truth in zip(_columns(part)[:4], _columns(one)[:4], strict=True):
                assert column == pytest.approx(truth, rel=1e-5, abs=1e-7)
        owned = [sum(rows) for rows in zip(*(_columns(part)[4] for part in parts), strict=True)]
        assert owned == pytest.approx(_columns(one)[4], rel=1e-6)
        for kind in ("by_cluster", "by_class"):
            for key, values in one[kind].items():
                assert torch.allclose(torch.cat([part[kind][key] for part in parts]), values, rtol=0, atol=2e-6), key


def _columns(part: dict[str, Any]) -> list[list[float]]:
    return [list(column) for column in zip(*part["scalars"], strict=True)]


# ---- versions --------------------------------------------------------------------------------------------------


def _version_and_ramp(group: dist.ProcessGroup, wanted: dict[str, Any]) -> list[tuple[int, float]]:
    service = build(group, NOISY, **wanted)
    seen: list[tuple[int, float]] = []
    train(service, NOISY, each=lambda step, _: seen.append((service.version, service.ramp(step))))
    return seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_versions_count_up_at_the_same_step_on_all_ranks(ranks: RankPool, world_size: int) -> None:
    """Refreshes begin after 4, 8 and 12 steps and take 2: steps 6, 10 and 14 are the first with a new version."""
    expected = [0] * 6 + [1] * 4 + [2] * 4 + [3] * 2
    for found in ranks.run(world_size, _version_and_ramp, {}):
        assert [version for version, _ in found] == expected
        assert [ramp for _, ramp in found] == [0.0] * 7 + [0.25, 0.5, 0.75] + [1.0] * 6


@pytest.mark.parametrize("span", [0.25, 1.0])
def test_the_ramp_never_runs_without_a_publication(ranks: RankPool, span: float) -> None:
    wanted = {"refresh_span": span, "warmup_fraction": 0.0, "ramp_fraction": 0.0}
    for version, ramp in ranks.run(2, _version_and_ramp, wanted)[0]:
        assert ramp == float(version > 0)


# ---- plain where nothing guides --------------------------------------------------------------------------------

GUIDED_HEAD: dict[str, tuple[int, dict[str, Any]]] = {
    "before the first publication": (5, {}),
    "warm-up, clusters published": (6, {"warmup_fraction": 0.9}),
    "first step of the ramp": (6, {"warmup_fraction": 0.0, "ramp_fraction": 0.1}),
    "delta 0": (STEPS, {"margin_delta": 0.0}),
    "direction 0": (STEPS, {"direction": 0}),
    "delta 0, ungated": (STEPS, {"margin_delta": 0.0, "noise_gate": False}),
    "bounds that leave one margin": (STEPS, {"margin_low": 0.5, "margin_high": 0.5}),
}


def _plain_and_guided(
    group: dist.ProcessGroup, steps: int, wanted: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], int]:
    """Losses, gradients of x and of W without a service, and with its margins and lambda = 0; and its suspects."""
    service = trained(group, NOISY, stop=steps, **wanted)
    results: list[list[Tensor]] = []
    for guided in (False, True):
        found: list[Tensor] = []
        for sample_rate in (1.0, 0.5):
            config = HeadConfig(sample_rate=sample_rate)
            head = PartialFCHead(num_classes=9, embedding_size=8, config=config, group=group, seed=1)
            for step in range(7):  # nearly all samples, suspects among them
                x_BD, batch = batch_at(group, NOISY, step)
                loss = head(batch, step=step, row_margins_N=service.row_margins(batch) if guided else None)
                if guided:
                    terms = 0.0 * service.contrastive(batch) + 0.0 * service.alignment(batch, head.weight)
                    loss = loss + service.ramp(steps) * terms
                loss.backward()
                assert x_BD.grad is not None
                found += [loss.detach(), x_BD.grad]
            assert head.weight.grad is not None
            found.append(head.weight.grad.to_dense())
        results.append(found)
    suspects = 0 if service._published is None else int((service._published.code_I < 0).sum())
    return results[0], results[1], suspects


@pytest.mark.parametrize("name", GUIDED_HEAD)
def test_without_guidance_it_is_the_plain_head_bit_for_bit(ranks: RankPool, name: str) -> None:
    for plain, guided, suspects in ranks.run(2, _plain_and_guided, *GUIDED_HEAD[name]):
        assert (suspects > 0) == (name not in {"before the first publication", "delta 0, ungated"})
        for expected, found in zip(plain, guided, strict=True):
            assert torch.equal(found, expected)


def test_guidance_changes_the_head(ranks: RankPool) -> None:
    plain, guided, _ = ranks.run(1, _plain_and_guided, STEPS, {})[0]
    assert not torch.equal(guided[0], plain[0])


# ---- reports ---------------------------------------------------------------------------------------------------


COUNTS = (1, 2, 50)


def _extremes(group: dist.ProcessGroup, case: Case) -> list[Any]:
    service = build(group, case)
    assert service.easiest_and_hardest(2) is None, "before the first publication"
    train(service, case, stop=10)
    return [service.easiest_and_hardest(count) for count in COUNTS]


@pytest.mark.parametrize("name", ["long tail", "classes without samples", "labels confused"])
def test_easiest_and_hardest_classes(ranks: RankPool, name: str) -> None:
    (one,) = ranks.run(1, _extremes, CASES[name])
    present = sum(size > 0 for size in CASES[name]["sizes"])
    everything = [row.label for row in one[2]]
    for count, rows in zip(COUNTS, one, strict=True):
        assert [row.hard_level for row in rows] == sorted(row.hard_level for row in rows)
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels) == min(2 * count, present)
        assert all(row.samples > 0 for row in rows)
        if 2 * count < present:
            assert labels == everything[:count] + everything[-count:]
    for world_size in WORLD_SIZES[1:]:
        for found in ranks.run(world_size, _extremes, CASES[name]):
            for rows, expected in zip(found, one, strict=True):
                assert [(row.label, row.samples) for row in rows] == [(row.label, row.samples) for row in expected]
                for key in ("hard_level", "margin"):
                    truth = [getattr(row, key) for row in expected]
                    assert [getattr(row, key) for row in rows] == pytest.approx(truth, abs=1e-6)


def _statistics(group: dist.ProcessGroup) -> tuple[dict[str, float], dict[str, float]]:
    service = build(group, NOISY)
    before = service.statistics(0)
    train(service, NOISY)
    return before, service.statistics(STEPS)


def test_statistics(ranks: RankPool) -> None:
    before, after = ranks.run(2, _statistics)[0]
    assert before == {"clusters/version": 0.0, "clusters/ramp": 0.0, "clusters/failed_refreshes": 0.0}
    shares = {
        "seen",
        "suspects",
        "suspects_kept",
        "drops_suspects",
        "moved",
        "purity",
        "empty",
        "agreement",
        "hard_level_mean",
        "hard_level_deviation",
    }
    names = {*shares, "version", "ramp", "margin_mean", "margin_deviation", "failed_refreshes"}
    assert set(after) == {f"clusters/{name}" for name in names}
    assert all(0 <= after[f"clusters/{name}"] <= 1 for name in shares)
    assert after["clusters/version"] == 3
    assert after["clusters/ramp"] == 1
    assert after["clusters/seen"] == 1
    assert after["clusters/suspects"] > 0.05, "14 of 90 labels are flipped"
    assert after["clusters/margin_mean"] == pytest.approx(0.5, abs=1e-12), "of all rows, suspects among them"


def _outside(group: dist.ProcessGroup) -> str:
    with pytest.raises(ValueError, match="margin: expected") as error:
        build(group, NOISY, margin=0.3)
    return str(error.value)


def test_a_margin_outside_its_bounds_is_refused(ranks: RankPool) -> None:
    assert "0.35 … 0.65" in ranks.run(1, _outside)[0]
