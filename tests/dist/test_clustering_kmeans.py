"""K-means over ranks, slice by slice, against the readable one; and a run that is saved between any two slices."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans import class_mean_centres, spherical_kmeans
from clustering.method.gate import find_suspects
from clustering.method.hardness import CountTable
from clustering.reference import dense_suspects
from clustering.service.dist_kmeans import KMeansRun
from sharding import shard_of
from tests.dist.clustering_cases import CASES, Case, by_sample, filled_bank, problem, seen_rows
from tests.ranks import WORLD_SIZES, RankPool


def _gate(bank: Any, C: int, K: int, group: dist.ProcessGroup, cluster_P: Tensor) -> Tensor:
    table = CountTable.count(bank.class_P, cluster_P, cluster_P >= 0, bank.shard, C, K)
    return (cluster_P >= 0) & ~find_suspects(table, bank.class_P, cluster_P, group)


def _new_run(group: dist.ProcessGroup, case: Case, start_KD: Tensor | None, gated: bool, dtype: torch.dtype) -> Any:
    _, _, C, K = problem(case)
    bank = filled_bank(group, case, dtype)
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), K)
    return KMeansRun(
        points=bank.points(),
        centres_SD=None if start_KD is None else start_KD[own.start : own.stop],
        num_clusters=K,
        iterations=case.get("iterations", 3),
        block=case.get("block", 5),
        gate=functools.partial(_gate, bank, C, K, group) if gated else None,
        group=group,
    )


def _finish(run: Any) -> dict[str, Any]:
    while run.advance():
        pass
    return {
        "centres": run.centres_SD,
        "index": (run.points.sample_P, run.index_P),
        "counted": (run.points.sample_P, run.counted_P),
        "slices": run.length,
    }


def _run(group: dist.ProcessGroup, case: Case, start_KD: Tensor | None, gated: bool) -> dict[str, Any]:
    return _finish(_new_run(group, case, start_KD, gated, torch.float64))


def _expected(case: Case, start_KD: Tensor | None, gated: bool) -> Any:
    x_ND, labels_N, C, K = problem(case)
    seen_N = seen_rows(case)
    x_ND, labels_N = x_ND[seen_N], labels_N[seen_N]
    if start_KD is None:
        start_KD = class_mean_centres(x_ND, labels_N, C, K)
    gate = (lambda index_N: (index_N >= 0) & ~dense_suspects(labels_N, index_N, C, K)) if gated else None
    return spherical_kmeans(x_ND, labels_N, start_KD, iterations=case.get("iterations", 3), gate=gate)


def _check(parts: list[dict[str, Any]], expected: Any, case: Case) -> None:
    seen_N = seen_rows(case)
    index_N = by_sample([part["index"] for part in parts], len(seen_N))
    counted_N = by_sample([part["counted"] for part in parts], len(seen_N))
    assert torch.equal(index_N[seen_N], expected.index_N)
    assert (index_N[~seen_N] == -1).all()
    assert torch.equal(counted_N[seen_N], expected.counted_N)
    assert not counted_N[~seen_N].any()
    centres_KD = torch.cat([part["centres"] for part in parts])
    assert torch.allclose(centres_KD, expected.centres_KD, atol=1e-12)
    length_K = centres_KD.norm(dim=1)
    assert ((length_K - 1).abs().minimum(length_K) < 1e-12).all(), "unit, or not yet a centre"
    assert len({part["slices"] for part in parts}) == 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_readable_kmeans(ranks: RankPool, name: str, gated: bool, world_size: int) -> None:
    case = CASES[name]
    _check(ranks.run(world_size, _run, case, None, gated), _expected(case, None, gated), case)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("block", [1, 1000])
def test_warm_start_and_block_size(ranks: RankPool, world_size: int, block: int) -> None:
    case = {**CASES["even"], "block": block, "iterations": 2}
    generator = torch.Generator().manual_seed(5)
    start_KD = torch.nn.functional.normalize(torch.randn(16, 6, generator=generator, dtype=torch.float64))
    start_KD[3] = 0
    _check(ranks.run(world_size, _run, case, start_KD, True), _expected(case, start_KD, True), case)


def test_gate_leaves_the_flipped_labels_out() -> None:
    case = CASES["labels confused"]
    _, labels_N, _, _ = problem(case)
    truth_N = problem({**case, "flipped": 0})[1]
    counted_N = _expected(case, None, True).counted_N
    flipped_N = truth_N != labels_N
    assert flipped_N.sum() == 14
    assert (~counted_N[flipped_N]).float().mean() > 0.7
    assert (~counted_N[~flipped_N]).float().mean() < 0.05


def _resumed(group: dist.ProcessGroup, case: Case) -> list[int]:
    """Stop after every number of slices, save, load into a new run, go on: slices after which the end differed."""
    whole = _finish(_new_run(group, case, None, True, torch.bfloat16))
    differs = []
    for stop in range(whole["slices"]):
        first = _new_run(group, case, None, True, torch.bfloat16)
        for _ in range(stop):
            first.advance()
        state = copy.deepcopy(first.state_dict())
        second = _new_run(group, case, None, True, torch.bfloat16)
        second.load_state_dict(state)
        found = _finish(second)
        same = torch.equal(found["centres"], whole["centres"]) and torch.equal(found["index"][1], whole["index"][1])
        if not (same and torch.equal(found["counted"][1], whole["counted"][1])):
            differs.append(stop)
    return differs


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_saved_between_any_two_slices_ends_bit_for_bit_the_same(ranks: RankPool, world_size: int) -> None:
    case = {**CASES["labels confused"], "iterations": 2, "block": 8}
    assert ranks.run(world_size, _resumed, case) == [[]] * world_size


def _nothing_seen(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    case: Case = {"sizes": [3, 2, 4], "dim": 4, "extra": 1, "unseen": 9}
    run = _new_run(group, case, None, True, torch.bfloat16)
    _finish(run)
    return run.centres_SD, run.index_P


def test_without_embeddings_nothing_is_assigned(ranks: RankPool) -> None:
    for centres_SD, index_P in ranks.run(2, _nothing_seen):
        assert (centres_SD == 0).all()
        assert (index_P == -1).all()
