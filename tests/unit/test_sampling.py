"""Sampled class centres: the same for any cut into shards, as many as asked for, evenly drawn, positives always in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc.sampling import drawn_classes, sample_rows
from sharding import Shard, all_shards

CPU = torch.device("cpu")


def _draw(shard: Shard, classes: int, rate: float, *, seed: int = 1, step: int = 0) -> torch.Tensor:
    return drawn_classes(shard, classes, rate, seed=seed, step=step, device=CPU)


@settings(max_examples=80, deadline=None)
@given(
    classes=st.sampled_from([1, 2, 7, 123, 507, 1023, 1024, 1025, 4099, 10_000]),
    world_size=st.integers(1, 9),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**7),
)
def test_any_cut_into_shards_draws_the_same_classes(
    classes: int, world_size: int, rate: float, seed: int, step: int
) -> None:
    whole = _draw(Shard(0, classes), classes, rate, seed=seed, step=step)
    parts = [_draw(shard, classes, rate, seed=seed, step=step) for shard in all_shards(world_size, classes)]
    assert torch.equal(torch.cat(parts), whole)
    assert int(whole.sum()) in {math.floor(rate * classes), math.floor(rate * classes) + 1}


@pytest.mark.parametrize("classes", [3000, 1025, 2049])
def test_every_class_has_the_same_chance(classes: int) -> None:
    """Over 2000 steps each class is drawn as often as a coin of that rate would, and pairs independently; a last block
    of one class too."""
    steps, rate = 2000, 0.1
    drawn = torch.stack([_draw(Shard(0, classes), classes, rate, step=step) for step in range(steps)]).double()
    deviation = (drawn.mean(0) - rate) / (rate * (1 - rate) / steps) ** 0.5
    assert float(deviation.abs().max()) < 5
    assert float(deviation.square().mean()) == pytest.approx(1, abs=0.1)
    together = (drawn[:, :-1] * drawn[:, 1:]).mean()
    assert float(together) == pytest.approx(rate * rate, rel=0.05)


def test_steps_and_seeds_draw_others() -> None:
    shard = Shard(0, 4099)
    base = _draw(shard, 4099, 0.3)
    assert torch.equal(base, _draw(shard, 4099, 0.3))
    for other in (_draw(shard, 4099, 0.3, step=1), _draw(shard, 4099, 0.3, seed=2)):
        assert 0.2 < float((base & other).sum() / base.sum()) < 0.4, "as independent draws overlap"


def test_positives_always_take_part() -> None:
    shard = Shard(100, 1300)
    positive_N = torch.tensor([5, -1, 1199, 5, 0, -1])
    rows_S = sample_rows(positive_N, shard, 5000, 0.01, seed=3, step=9).trimmed(shard.size)
    drawn = _draw(shard, 5000, 0.01, seed=3, step=9).nonzero()[:, 0]
    assert rows_S.tolist() == sorted({*drawn.tolist(), 0, 5, 1199})
    assert sample_rows(positive_N[:0], Shard(7, 7), 7, 0.5, seed=3, step=9).rows_S.tolist() == []
