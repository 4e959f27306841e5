"""Counts, noise gate, hard level, margins and matching: sharded and sparse against dense float64, and their laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clustering.kmeans import class_mean_centres, spherical_kmeans
from clustering.method.align import match_classes
from clustering.method.gate import find_suspects
from clustering.method.hardness import CountTable, agreement, cohesion, hard_level, of_all_classes
from clustering.method.margins import class_margins, ramped, smallest_margin
from clustering.reference import (
    dense_agreement,
    dense_cohesion,
    dense_counts,
    dense_hard_level,
    dense_margins,
    dense_suspects,
    greedy_matching,
)
from sharding import Shard, shard_of
from tests.dist.clustering_cases import CASES, by_sample, problem, relative
from tests.ranks import WORLD_SIZES, RankPool

MARGINS: dict[str, Any] = {"margin": 0.5, "low": 0.35, "high": 0.65, "delta": 0.1, "direction": 1}


def _pipeline(
    group: dist.ProcessGroup, x_ND: Tensor, labels_N: Tensor, clusters_N: Tensor, C: int, K: int, gated: bool
) -> dict[str, Any]:
    """Everything between k-means and the losses, on this rank's samples sorted by (class, sample)."""
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), C)
    mine = ((labels_N >= shard.start) & (labels_N < shard.stop)).nonzero()[:, 0]
    mine = mine[labels_N[mine].argsort(stable=True)]
    class_P, cluster_P = labels_N[mine], clusters_N[mine]
    suspect_P = torch.zeros_like(class_P, dtype=torch.bool)
    if gated:
        everything = CountTable.count(class_P, cluster_P, cluster_P >= 0, shard, C, K)
        suspect_P = find_suspects(everything, class_P, cluster_P, group)
    counted_P = (cluster_P >= 0) & ~suspect_P
    table = CountTable.count(class_P, cluster_P, counted_P, shard, C, K)
    f_R = agreement(table, table.cluster_sizes(group))
    rho_R, sums_RD = cohesion(x_ND[mine], class_P - shard.start, counted_P, shard.size)
    own = slice(shard.start, shard.stop)
    numbers_4R = torch.stack([f_R, rho_R, table.samples().double(), _per_class(suspect_P, class_P, shard)])
    f_C, rho_C, n_C, suspects_C = of_all_classes(numbers_4R, shard, C, group)
    h_C = hard_level(f_C, rho_C, n_C, purity_weight=0.7, shrinkage=5.0)
    class_K, owner_K = match_classes(table, group)
    t_RK = torch.zeros(shard.size, K, dtype=torch.int64)
    t_RK[table.row_Q, table.cluster_Q] = table.count_Q
    return {
        "t": t_RK,
        "suspect": (mine, suspect_P),
        "f": f_R,
        "rho": rho_R,
        "sums": sums_RD,
        "h": h_C[own],
        "m": class_margins(h_C, n_C, suspects=suspects_C.sum(), **MARGINS)[own],
        "class_K": class_K,
        "owner_K": owner_K,
    }


def _per_class(taken_P: Tensor, class_P: Tensor, shard: Shard) -> Tensor:
    return torch.bincount(class_P[taken_P] - shard.start, minlength=shard.size).double()


def _clusters(name: str) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Embeddings, labels, and the clusters of the readable k-means; sample 0 has none."""
    x_ND, labels_N, C, K = problem(CASES[name])
    clusters_N = spherical_kmeans(x_ND, labels_N, class_mean_centres(x_ND, labels_N, C, K), iterations=2).index_N
    clusters_N[0] = -1
    return x_ND, labels_N, clusters_N, C, K


def _dense(x_ND: Tensor, labels_N: Tensor, clusters_N: Tensor, C: int, K: int, gated: bool) -> dict[str, Any]:
    suspect_N = torch.zeros_like(labels_N, dtype=torch.bool)
    if gated:
        suspect_N = dense_suspects(labels_N, clusters_N, C, K)
    kept_N = (clusters_N >= 0) & ~suspect_N
    t_CK = dense_counts(labels_N[kept_N], clusters_N[kept_N], C, K)
    f_C, rho_C = dense_agreement(t_CK), dense_cohesion(x_ND[kept_N], labels_N[kept_N], C)
    n_C = t_CK.sum(1)
    h_C = dense_hard_level(f_C, rho_C, n_C, 0.7, 5.0)
    m_C = dense_margins(h_C, n_C, int(suspect_N.sum()), **MARGINS)
    return {"t": t_CK, "suspect": suspect_N, "f": f_C, "rho": rho_C, "h": h_C, "m": m_C, "n": n_C}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_dense(ranks: RankPool, name: str, gated: bool, world_size: int) -> None:
    data = _clusters(name)
    truth = _dense(*data, gated)
    parts = ranks.run(world_size, _pipeline, *data, gated)
    assert torch.equal(torch.cat([part["t"] for part in parts]), truth["t"].long())
    assert torch.equal(by_sample([part["suspect"] for part in parts], len(data[1])), truth["suspect"])
    for key in ("f", "rho", "h", "m"):
        found = torch.cat([part[key] for part in parts])
        assert torch.isfinite(found).all()
        assert torch.allclose(found, truth[key], atol=1e-12), key
    expected = greedy_matching(truth["t"])
    for part in parts:
        assert part["class_K"].tolist() == expected
        for k, owner in enumerate(part["owner_K"].tolist()):
            present = truth["t"][:, k].sum() > 0
            dominant = int(truth["t"][:, k].argmax()) if present else -1
            assert owner == (expected[k] if expected[k] >= 0 else dominant)


@pytest.mark.parametrize("name", ["even", "long tail", "labels confused"])
def test_statistics_are_the_same_bits_on_any_number_of_ranks(ranks: RankPool, name: str) -> None:
    data = _clusters(name)
    one = ranks.run(1, _pipeline, *data, True)[0]
    for world_size in (2, 4):
        parts = ranks.run(world_size, _pipeline, *data, True)
        for key in ("t", "f", "rho", "sums", "h", "m"):
            assert torch.equal(torch.cat([part[key] for part in parts]), one[key]), key


# ---- laws of the hard level ------------------------------------------------------------------------------------


def _one(ranks: RankPool, x_ND: Tensor, labels_N: Tensor, clusters_N: Tensor, K: int, gated: bool = False) -> Any:
    return ranks.run(1, _pipeline, x_ND, labels_N, clusters_N, int(labels_N.max()) + 1, K, gated)[0]


def test_cluster_ids_do_not_matter_and_classes_permute(ranks: RankPool) -> None:
    x_ND, labels_N, clusters_N, C, K = _clusters("labels confused")
    base = _one(ranks, x_ND, labels_N, clusters_N, K, gated=True)
    generator = torch.Generator().manual_seed(2)
    new_id_K = torch.randperm(K, generator=generator)
    renamed_N = torch.where(clusters_N >= 0, new_id_K[clusters_N], -1)
    renamed = _one(ranks, x_ND, labels_N, renamed_N, K, gated=False)
    plain = _one(ranks, x_ND, labels_N, clusters_N, K, gated=False)
    assert torch.allclose(renamed["h"], plain["h"], atol=1e-14)
    new_class_C = torch.randperm(C, generator=generator)
    permuted = _one(ranks, x_ND, new_class_C[labels_N], clusters_N, K, gated=False)
    assert torch.allclose(permuted["h"][new_class_C], plain["h"], atol=1e-14)
    assert not torch.allclose(base["h"], plain["h"])


def test_perfect_clusters_leave_the_spread_alone(ranks: RankPool) -> None:
    x_ND, labels_N, C, K = problem(CASES["even"])
    found = _one(ranks, x_ND, labels_N, labels_N, K)
    assert torch.equal(found["f"], torch.ones(C, dtype=torch.float64))
    assert torch.allclose(found["rho"], dense_cohesion(x_ND, labels_N, C))
    raw_C = 0.3 * (1 - found["rho"].clamp(0, 1))
    assert torch.allclose(found["h"], (7 * raw_C + 5 * raw_C.mean()) / 12)


def test_splitting_and_merging_make_a_class_harder(ranks: RankPool) -> None:
    x_ND, labels_N, _, K = problem(CASES["even"])
    base = _one(ranks, x_ND, labels_N, labels_N, K)["h"]
    split_N = labels_N.clone()
    split_N[(labels_N == 4).nonzero()[:3, 0]] = 13
    split = _one(ranks, x_ND, labels_N, split_N, K)["h"]
    assert split[4] > base[4] + 0.05
    assert split[4] == split.max()
    merged = _one(ranks, x_ND, labels_N, torch.where(labels_N == 5, 6, labels_N), K)["h"]
    assert (merged[5:7] > base[5:7] + 0.05).all()


def test_cohesion_is_unbiased_for_few_samples(ranks: RankPool) -> None:
    """Samples drawn around one direction: pairs of 2 and pairs of 40 estimate the same mean cosine."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 40):
        classes = 4000 // n
        x_ND = F.normalize(torch.ones(8) + 1.5 * torch.randn(classes * n, 8, generator=generator)).double()
        labels_N = torch.repeat_interleave(torch.arange(classes), n)
        rho = _one(ranks, x_ND, labels_N, labels_N, classes)["rho"].mean()
        truth = F.normalize(torch.ones(8) + 1.5 * torch.randn(200000, 8, generator=generator)).mean(0).square().sum()
        assert float(rho) == pytest.approx(float(truth), abs=0.02)


def test_noise_gate_keeps_mislabelled_samples_from_making_classes_look_hard(ranks: RankPool) -> None:
    """20% closed-set label noise: h of noisy classes stands far above that of clean ones, and returns with the gate."""
    clean = {"sizes": [20] * 60, "dim": 32, "spread": 0.1, "extra": 9, "seed": 4}
    noisy = {**clean, "flipped": 240}
    levels = {}
    for name, case in (("clean", clean), ("noisy", noisy)):
        x_ND, labels_N, C, K = problem(case)
        clusters_N = spherical_kmeans(x_ND, labels_N, class_mean_centres(x_ND, labels_N, C, K), iterations=3).index_N
        for gated in (False, True):
            found = _one(ranks, x_ND, labels_N, clusters_N, K, gated)
            levels[name, gated] = float(found["h"].mean())
            if name == "noisy" and gated:
                suspect_N = by_sample([found["suspect"]], len(labels_N))
                flipped_N = labels_N != problem(clean)[1]
                assert suspect_N[flipped_N].float().mean() > 0.95, "recall"
                assert flipped_N[suspect_N].float().mean() > 0.95, "precision"
    assert levels["noisy", False] > levels["clean", False] + 0.15
    assert levels["noisy", True] == pytest.approx(levels["clean", True], abs=0.03)


# ---- margins ---------------------------------------------------------------------------------------------------


def _margins(h_C: Tensor, n_C: Tensor, wanted: dict[str, Any]) -> Tensor:
    return class_margins(h_C, n_C, **{"suspects": 0, **MARGINS, **wanted})


@settings(max_examples=200, deadline=None)
@given(
    levels=st.lists(st.floats(0, 1), min_size=2, max_size=30),
    delta=st.floats(0, 0.4),
    direction=st.sampled_from([-1, 0, 1]),
    margin=st.floats(0.35, 0.65),
    suspects=st.integers(0, 2000),
    seed=st.integers(0, 1000),
)
def test_margins_are_monotone_bounded_and_centred(
    levels: list[float], delta: float, direction: int, margin: float, suspects: int, seed: int
) -> None:
    """The mean is that of all rows: suspects get the smallest margin."""
    h_C = torch.tensor(levels, dtype=torch.float64)
    n_C = torch.randint(1, 50, h_C.shape, generator=torch.Generator().manual_seed(seed)).double()
    m_C = _margins(h_C, n_C, {"delta": delta, "direction": direction, "margin": margin, "suspects": suspects})
    assert ((m_C >= 0.35) & (m_C <= 0.65)).all()
    rows = float((m_C * n_C).sum() + suspects * smallest_margin(m_C, margin))
    assert rows / (float(n_C.sum()) + suspects) == pytest.approx(margin, abs=1e-12)
    steps = m_C[h_C.argsort()].diff()
    assert (direction * steps >= -1e-15).all() if direction else (steps.abs() < 1e-15).all()


@pytest.mark.parametrize("margin", [0.5, 0.3, 0.437])
@pytest.mark.parametrize("wanted", [{"delta": 0.0}, {"direction": 0}, {"equal": True}])
@pytest.mark.parametrize("suspects", [0, 5, 10**6])
def test_no_guidance_is_exactly_the_plain_margin(margin: float, wanted: dict[str, Any], suspects: int) -> None:
    wanted = {**wanted, "margin": margin, "low": 0.1, "suspects": suspects}
    h_C = torch.rand(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if wanted.pop("equal", False):
        h_C[:] = 0.37
    full_C = _margins(h_C, torch.arange(23, dtype=torch.float64), wanted)
    for ramp in (0.0, 0.3, 1.0):
        assert torch.equal(ramped(full_C, margin, ramp), torch.full((23,), margin))


def test_ramp_goes_from_the_plain_margin_to_the_full_one_and_keeps_the_mean() -> None:
    full_R = torch.tensor([0.35, 0.5, 0.65], dtype=torch.float64)
    assert torch.equal(ramped(full_R, 0.5, 0.0), torch.full((3,), 0.5))
    assert torch.equal(ramped(full_R, 0.5, 1.0), full_R.float())
    assert float(ramped(full_R, 0.5, 0.4).mean()) == pytest.approx(0.5)


def test_margins_without_any_sample_are_the_plain_one() -> None:
    m_C = _margins(torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), {})
    assert torch.equal(m_C, torch.full((5,), 0.5, dtype=torch.float64))


# ---- matching --------------------------------------------------------------------------------------------------


def _match(group: dist.ProcessGroup, t_CK: Tensor) -> Tensor:
    C, K = t_CK.shape
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), C)
    row_Q, cluster_Q = t_CK[shard.start : shard.stop].nonzero().unbind(1)
    table = CountTable(
        row_Q=row_Q,
        cluster_Q=cluster_Q,
        count_Q=t_CK[shard.start : shard.stop][row_Q, cluster_Q],
        shard=shard,
        num_classes=C,
        num_clusters=K,
    )
    return match_classes(table, group)[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=st.integers(1, 9), clusters=st.integers(1, 11), most=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_matching_is_the_greedy_one_and_worth_half_the_best(
    ranks: RankPool, classes: int, clusters: int, most: int, seed: int
) -> None:
    t_CK = torch.randint(0, most + 1, (classes, clusters), generator=torch.Generator().manual_seed(seed))
    expected = greedy_matching(t_CK)
    for found in ranks.run(2, _match, t_CK):
        assert found.tolist() == expected
    worth = sum(int(t_CK[y, k]) for k, y in enumerate(expected) if y >= 0)
    rows, columns = linear_sum_assignment(-t_CK.numpy())
    assert 2 * worth >= t_CK.numpy()[rows, columns].sum()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_long_chain_of_dependent_matches(ranks: RankPool, world_size: int) -> None:
    """Class y can have cluster y or y + 1, and each choice waits for the one before: one match a round."""
    t_CK = torch.zeros(12, 13, dtype=torch.int64)
    for y in range(12):
        t_CK[y, y], t_CK[y, y + 1] = 100 - 2 * y, 99 - 2 * y
    for found in ranks.run(world_size, _match, t_CK.flip(1)):
        assert found.tolist() == greedy_matching(t_CK.flip(1))


def test_matching_is_the_best_one_where_clusters_are_clear(ranks: RankPool) -> None:
    x_ND, labels_N, C, K = problem({**CASES["even"], "spread": 0.1, "dim": 16})
    clusters_N = spherical_kmeans(x_ND, labels_N, class_mean_centres(x_ND, labels_N, C, K), iterations=3).index_N
    t_CK = dense_counts(labels_N, clusters_N, C, K).long()
    found = ranks.run(1, _match, t_CK)[0]
    rows, columns = linear_sum_assignment(-t_CK.numpy())
    best = np.full(K, -1)
    best[columns] = rows
    assert relative(found, torch.from_numpy(best)) == 0
