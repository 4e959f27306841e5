"""Nearest classes: sharded and tiled against a dense float64 sort, and what the service hands to a step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.method.neighbours import nearest_classes
from clustering.reference import dense_neighbours
from partial_fc.collectives import GatheredBatch
from sharding import shard_of
from tests.dist.service_cases import EPOCH, NOISY, STEPS, batch_at, build, train, trained
from tests.ranks import WORLD_SIZES, RankPool

_GRID = 2.0**-16


def _anchors(C: int, D: int) -> Tensor:
    """float64 unit rows; every fifth class stands where the one before it does, every seventh was never seen."""
    anchor_CD = F.normalize(torch.randn(C, D, generator=torch.Generator().manual_seed(C), dtype=torch.float64))
    for y in range(4, C, 5):
        anchor_CD[y] = anchor_CD[y - 1]
    anchor_CD[6::7] = 0
    return anchor_CD


def _nearest(group: dist.ProcessGroup, anchor_CD: Tensor, count: int) -> Tensor:
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), len(anchor_CD))
    return nearest_classes(anchor_CD[own.start : own.stop].clone(), len(anchor_CD), count, group)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("C", "D", "count"), [(1, 3, 2), (2, 3, 1), (7, 4, 6), (7, 4, 9), (123, 5, 8), (507, 16, 3)])
def test_nearest_classes_equal_a_dense_sort(ranks: RankPool, C: int, D: int, count: int, world_size: int) -> None:
    truth = dense_neighbours(_anchors(C, D), count)
    for found in ranks.run(world_size, _nearest, _anchors(C, D), count):
        assert found.dtype == torch.int32
        assert found.tolist() == truth


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_many_tiles(ranks: RankPool, world_size: int) -> None:
    """4099 classes are several blocks of rows and many tiles on every rank."""
    C, count = 4099, 5
    anchor_CD = _anchors(C, 8)
    rows = torch.arange(0, C, 37)
    level_qC = (anchor_CD[rows] @ anchor_CD.T / _GRID).round()
    level_qC[:, (anchor_CD == 0).all(1)] = -torch.inf
    level_qC.scatter_(1, rows[:, None], -torch.inf)
    truth_qk = level_qC.argsort(dim=1, descending=True, stable=True)[:, :count]
    truth_qk[(anchor_CD[rows] == 0).all(1)] = -1
    tables = ranks.run(world_size, _nearest, anchor_CD, count)
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert torch.equal(tables[0][rows].long(), truth_qk)


@pytest.mark.parametrize("C", [252, 507])
def test_float32_anchors_are_sorted_within_the_grid(ranks: RankPool, C: int) -> None:
    anchor_CD = F.normalize(torch.randn(C, 64, generator=torch.Generator().manual_seed(1)))
    cosine_CC = (anchor_CD.double() @ anchor_CD.double().T).fill_diagonal_(-2)
    truth_Ck = cosine_CC.sort(dim=1, descending=True).values[:, :8]
    for world_size in WORLD_SIZES:
        found_Ck = ranks.run(world_size, _nearest, anchor_CD, 8)[0].long()
        assert ((cosine_CC.gather(1, found_Ck) - truth_Ck).abs() < 1.1 * _GRID).all()


def test_ties_go_to_the_smaller_class_on_any_number_of_ranks(ranks: RankPool) -> None:
    """Three directions in turn, at right angles: equal cosines everywhere."""
    C, count = 23, 10
    anchor_CD = torch.eye(3)[torch.arange(C) % 3]
    truth = []
    for y in range(C):
        alike = [c for c in range(C) if c != y and c % 3 == y % 3]
        truth.append((alike + [c for c in range(C) if c % 3 != y % 3])[:count])
    for world_size in WORLD_SIZES:
        for found in ranks.run(world_size, _nearest, anchor_CD, count):
            assert found.tolist() == truth


# ---- the service -----------------------------------------------------------------------------------------------


def _first_table(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    service = trained(group, NOISY, stop=EPOCH + 2, hard_negatives=3)
    assert service._published is not None
    return service._published.anchor_RD, service._published.neighbour_Ck


def test_a_publication_holds_the_neighbours_of_its_anchors(ranks: RankPool) -> None:
    (one,) = ranks.run(1, _first_table)
    assert one[1].tolist() == dense_neighbours(one[0], 3)
    for world_size in WORLD_SIZES[1:]:
        parts = ranks.run(world_size, _first_table)
        assert torch.equal(torch.cat([anchor for anchor, _ in parts]), one[0])
        assert all(torch.equal(table, one[1]) for _, table in parts)


def _hard_classes(group: dist.ProcessGroup, count: int) -> list[tuple[float, Any, Tensor, Any]]:
    """Of every step: the ramp, what the head would get, the labels, and the table it comes from."""
    service = build(group, NOISY, hard_negatives=count)
    seen: list[tuple[float, Any, Tensor, Any]] = []

    def look(step: int, batch: GatheredBatch) -> None:
        batch.labels_N[step % 3] = -1
        table = None if service._published is None else service._published.neighbour_Ck.clone()
        seen.append((service.ramp(step), service.hard_classes(batch), batch.labels_N, table))

    train(service, NOISY, each=look)
    return seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_hard_classes_are_the_neighbours_of_the_batch_once_the_ramp_began(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _hard_classes, 2)
    for steps in zip(*parts, strict=True):
        ramp, hard_M, labels_N, table_Ck = steps[0]
        if ramp == 0:
            assert all(step[1] is None for step in steps), "plain ArcFace until then"
            continue
        expected = [table_Ck[y].tolist() if y >= 0 else [-1, -1] for y in labels_N.tolist()]
        assert hard_M.dtype == torch.int64
        assert hard_M.view(-1, 2).tolist() == expected
        assert all(torch.equal(step[1], hard_M) for step in steps)
    assert sum(hard_M is not None for _, hard_M, _, _ in parts[0]) == STEPS - 7


def test_no_hard_classes_without_the_setting(ranks: RankPool) -> None:
    assert all(hard_M is None for _, hard_M, _, _ in ranks.run(2, _hard_classes, 0)[0])


def _resumed(group: dist.ProcessGroup) -> tuple[Tensor | None, Tensor | None]:
    service = trained(group, NOISY, stop=STEPS - 1, hard_negatives=3)
    stream = io.BytesIO()
    torch.save(service.state_dict(), stream)
    stream.seek(0)
    again = build(group, NOISY, hard_negatives=3)
    again.load_state_dict(torch.load(stream, weights_only=True))
    batch = batch_at(group, NOISY, STEPS - 1)[1]
    return service.hard_classes(batch), again.hard_classes(batch)


def test_neighbours_are_saved(ranks: RankPool) -> None:
    for before, after in ranks.run(2, _resumed):
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)
