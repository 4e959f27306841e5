"""`drop_suspects`: samples that look mislabelled leave the margin softmax, and nothing else changes its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from partial_fc.collectives import GatheredBatch
from tests.dist.service_cases import NOISY, STEPS, build, train, trained
from tests.ranks import WORLD_SIZES, RankPool


def _labels_of_each_step(
    group: dist.ProcessGroup, drop: bool, drop_from: float = 0.05
) -> list[tuple[float, Any, Any, Any]]:
    service = build(group, NOISY, drop_suspects=drop, drop_from=drop_from, drop_kept=0.0)
    seen = []

    def look(step: int, batch: GatheredBatch) -> None:
        suspects_I = service.suspects()
        suspect_N = torch.zeros_like(batch.labels_N) if suspects_I is None else suspects_I[batch.sample_ids_N]
        seen.append((service.ramp(step), batch.labels_N, service.for_head(batch).labels_N, suspect_N.bool()))

    train(service, NOISY, each=look)
    return seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_suspects_lose_their_label_once_the_ramp_begins_and_not_before(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _labels_of_each_step, True)
    dropped = 0
    for ramp, labels_N, judged_N, suspect_N in parts[0]:
        gone_N = suspect_N if ramp > 0 else torch.zeros_like(suspect_N)
        assert torch.equal(judged_N, torch.where(gone_N, -1, labels_N))
        dropped += int(gone_N.sum())
    assert dropped > 0
    for part in parts[1:]:
        assert all(torch.equal(mine[2], first[2]) for mine, first in zip(part, parts[0], strict=True))


@pytest.mark.parametrize("settings", [(False,), (True, 0.9)], ids=["without the setting", "too few of them"])
def test_otherwise_they_keep_it(ranks: RankPool, settings: tuple[Any, ...]) -> None:
    (seen,) = ranks.run(1, _labels_of_each_step, *settings)
    assert any(suspect_N.any() and ramp > 0 for ramp, _, _, suspect_N in seen)
    assert all(torch.equal(labels_N, judged_N) for _, labels_N, judged_N, _ in seen)


DRIFTING = {**NOISY, "drift": 0.5}
"""So far that suspects change: of the first and the second version's two thirds and a half stay."""


def _versions(group: dist.ProcessGroup, drop_kept: float) -> list[tuple[bool, float, Any]]:
    """Of each version: whether it drops, the share it says is kept, and its suspects."""
    service = build(group, DRIFTING, drop_suspects=True, drop_kept=drop_kept)
    found: list[tuple[bool, float, Any]] = []

    def look(_: int, __: GatheredBatch) -> None:
        published, suspects_I = service._published, service.suspects()
        if published is not None and suspects_I is not None and len(found) < published.version:
            found.append((published.drops_suspects, published.statistics["suspects_kept"], suspects_I.clone()))

    train(service, DRIFTING, each=look)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_version_drops_where_it_agrees_with_the_one_before(ranks: RankPool, world_size: int) -> None:
    nothing = torch.zeros_like(ranks.run(1, _versions, 0.0)[0][0][2])
    for drop_kept, expected in ((0.0, [True] * 3), (0.4, [False, True, True]), (0.6, [False, True, False])):
        parts = ranks.run(world_size, _versions, drop_kept)
        before_I, decisions = nothing, []
        for drops, share, suspects_I in parts[0]:
            kept = int((before_I & suspects_I).sum()) / max(1, int(before_I.sum()))
            assert share == pytest.approx(kept)
            assert drops == (bool(suspects_I.float().mean() >= 0.05) and kept >= drop_kept)
            before_I = suspects_I
            decisions.append(drops)
        assert decisions == expected
        assert all([drops for drops, *_ in part] == decisions for part in parts[1:])


def _mean_margin(group: dist.ProcessGroup, drop: bool, drop_from: float = 0.05) -> tuple[float, float, int]:
    """Over the samples that count, over those and the suspects at the smallest; number of suspects."""
    service = trained(group, NOISY, stop=STEPS, drop_suspects=drop, drop_from=drop_from, drop_kept=0.0)
    published, suspects_I = service._published, service.suspects()
    assert published is not None
    assert suspects_I is not None
    n_C, suspects = published.samples_R.double(), int(suspects_I.sum())
    counted = float((published.margin_R * n_C).sum() / n_C.sum())
    every = (counted * float(n_C.sum()) + suspects * float(published.smallest)) / (float(n_C.sum()) + suspects)
    return counted, every, suspects


def test_the_mean_margin_is_that_of_the_rows_that_training_sees(ranks: RankPool) -> None:
    ((counted, every, suspects),) = ranks.run(1, _mean_margin, True)
    assert suspects > 0
    assert counted == pytest.approx(0.5, abs=1e-9)
    assert every < 0.5 - 1e-4
    for settings in ((False,), (True, 0.9)):
        ((counted, every, _),) = ranks.run(1, _mean_margin, *settings)
        assert every == pytest.approx(0.5, abs=1e-9)
        assert counted > 0.5 + 1e-4
