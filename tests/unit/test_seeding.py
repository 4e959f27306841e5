"""Where k-means starts, and what merging and splitting gain: laws of chance, plain float64, rows that are no seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from clustering.job.together import InputError
from clustering.kmeans import assign
from clustering.lloyd.seeding import Placed, class_means, placed, plus_plus, race, random_rows, uniform
from clustering.lloyd.seeding_parallel import parallel_plus_plus
from clustering.lloyd.split_merge import choose, split_and_merge
from clustering.service.rows import TensorRows

CPU = torch.device("cpu")
SEEDINGS = [random_rows, plus_plus, parallel_plus_plus]


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


def _unit(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64)).to(dtype)


def _place(x_ND: Tensor) -> Placed:
    return placed(TensorRows(x_ND), 0, CPU)


def _faces(classes: int, each: int, dim: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    y_N = torch.arange(classes).repeat_interleave(each)
    return F.normalize(_unit(classes, dim, seed)[y_N] + noise * _unit(len(y_N), dim, seed + 1)), y_N


def test_uniform_numbers() -> None:
    u_P = uniform(torch.arange(1 << 15), seed=3, turn=5)
    assert 0 < u_P.min() < u_P.max() < 1
    assert stats.kstest(u_P.numpy(), "uniform").pvalue > 0.01
    assert torch.equal(uniform(torch.arange(100, 200), seed=3, turn=5), u_P[100:200]), "a function of the row alone"
    other_P = uniform(torch.arange(1 << 15), seed=3, turn=6)
    assert abs(np.corrcoef(u_P.numpy(), other_P.numpy())[0, 1]) < 0.02


def test_race_is_won_in_proportion_to_the_mass(group: dist.ProcessGroup) -> None:
    mass_P = torch.tensor([1.0, 0, 2, 3, 0.5, 1e-9, 3.5], dtype=torch.float64)
    number_P = torch.arange(7) * 10
    wins = np.zeros(7)
    turns = 4000
    for turn in range(turns):
        wins[int(race(number_P, mass_P, 1, group, seed=1, turn=turn)[0]) // 10] += 1
    assert wins[1] == wins[5] == 0
    kept = [0, 2, 3, 4, 6]
    expected = mass_P[kept].numpy() / mass_P[kept].sum().item() * turns
    assert stats.chisquare(wins[kept], expected).pvalue > 0.01


def test_first_two_centres_follow_the_law_of_kmeans_plus_plus(group: dist.ProcessGroup) -> None:
    """The second with a chance in proportion to its distance from the first, without the choice among candidates."""
    x_ND = _unit(12, 3)
    place = _place(x_ND)
    distance_NN = 1 - x_ND.double() @ x_ND.double().T
    seen = np.zeros((12, 12))
    for seed in range(3000):
        first = int(race(place.number_P, place.weight_P, 1, group, seed=seed, turn=0)[0])
        second = int(race(place.number_P, distance_NN[first].clamp_min(0), 1, group, seed=seed, turn=1)[0])
        seen[first, second] += 1
    law = (distance_NN / distance_NN.sum(1, keepdim=True)).clamp_min(0).numpy() / 12 * 3000
    large = law > 5
    observed = np.append(seen[large], seen[~large].sum())
    expected = np.append(law[large], law[~large].sum())
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def test_plus_plus_takes_the_candidate_that_helps_most(group: dist.ProcessGroup) -> None:
    x_ND, K, seed = _unit(123, 7), 6, 4
    place = _place(x_ND)
    x = x_ND.double()
    chosen = [int(race(place.number_P, torch.ones(123, dtype=torch.float64), 1, group, seed=seed, turn=0)[0])]
    for turn in range(1, K):
        distance = (1 - x @ x[chosen].T).amin(1).clamp_min(0)
        distance[chosen] = 0
        candidates = race(place.number_P, distance, 2 + int(math.log(K)), group, seed=seed, turn=turn).tolist()
        left = [(1 - x @ x[[*chosen, c]].T).amin(1).sum().item() for c in candidates]
        chosen.append(candidates[int(np.argmin(left))])
    assert torch.equal(plus_plus(place, K, group, seed=seed), x_ND[chosen])


@pytest.mark.parametrize("seeding", SEEDINGS)
@pytest.mark.parametrize(
    ("rows", "dim", "clusters"), [(1, 1, 1), (7, 123, 7), (123, 252, 1), (252, 7, 50), (507, 3, 123)]
)
def test_seeds_are_distinct_rows(group: dist.ProcessGroup, seeding: object, rows: int, dim: int, clusters: int) -> None:
    x_ND = _unit(rows, dim)
    centres_KD = seeding(_place(x_ND), clusters, group, seed=2)  # type: ignore[operator]
    assert centres_KD.shape == (clusters, dim)
    assert len({tuple(row) for row in centres_KD.tolist()}) == clusters
    assert {tuple(row) for row in centres_KD.tolist()} <= {tuple(row) for row in x_ND.tolist()}
    if rows > clusters > 1:
        assert not torch.equal(centres_KD, seeding(_place(x_ND), clusters, group, seed=3))  # type: ignore[operator]


@pytest.mark.parametrize("seeding", SEEDINGS)
def test_copies_and_zero_rows_seed_nothing(group: dist.ProcessGroup, seeding: object) -> None:
    distinct_ND = _unit(7, 5)
    x_ND = torch.cat([torch.zeros(30, 5), distinct_ND.repeat(20, 1)])
    found_KD = seeding(_place(x_ND), 7, group, seed=0)  # type: ignore[operator]
    assert {tuple(row) for row in found_KD.tolist()} == {tuple(row) for row in distinct_ND.tolist()}
    with pytest.raises(InputError, match=r"--k 8: .* got 7 of these"):
        seeding(_place(x_ND), 8, group, seed=0)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"got 0 of these"):
        seeding(_place(torch.zeros(4, 5)), 1, group, seed=0)  # type: ignore[operator]


def test_plus_plus_starts_better_than_chance(group: dist.ProcessGroup) -> None:
    x_ND, _ = _faces(40, 12, 32, noise=0.7)
    place = _place(x_ND)
    mean = {
        seeding.__name__: np.mean(
            [float(assign(x_ND, seeding(place, 40, group, seed=seed))[0].mean()) for seed in range(5)]
        )
        for seeding in SEEDINGS
    }
    assert mean["plus_plus"] > mean["random_rows"] + 0.03
    assert mean["parallel_plus_plus"] > mean["random_rows"] + 0.03


def test_class_means(group: dist.ProcessGroup) -> None:
    x_ND = _unit(123, 7)
    class_N = torch.arange(123) % 6 - 1  # class -1: none; cluster 5, 6: no class
    centres_KD = class_means(TensorRows(x_ND), class_N, 7, total=123, group=group)
    for k in range(5):
        assert torch.allclose(centres_KD[k].double(), F.normalize(x_ND[class_N == k].double().sum(0), dim=0), atol=1e-6)
    assert (centres_KD[5:] == 0).all()


def _objective(x_ND: Tensor, index_N: Tensor, K: int) -> float:
    sums = torch.zeros(K, x_ND.shape[1], dtype=torch.float64)
    return float(sums.index_add_(0, index_N[index_N >= 0], x_ND.double()[index_N >= 0]).norm(dim=1).sum())


def _means(x_ND: Tensor, index_N: Tensor, K: int) -> Tensor:
    has_N = index_N >= 0
    sums = torch.zeros(K, x_ND.shape[1], dtype=torch.float64)
    return F.normalize(sums.index_add_(0, index_N[has_N], x_ND.double()[has_N])).float()


@pytest.mark.parametrize(("rows", "dim", "clusters"), [(123, 7, 20), (252, 64, 30), (507, 123, 60)])
def test_rebuilding_raises_the_objective(group: dist.ProcessGroup, rows: int, dim: int, clusters: int) -> None:
    """New centres are the means of an assignment that is better than the old one by all gains less all losses."""
    x_ND = _unit(rows, dim)
    x_ND[::50] = 0
    index_N = torch.randint(0, clusters, (rows,), generator=torch.Generator().manual_seed(1)) % (clusters - 2)
    index_N[::50] = -1
    before_KD = _means(x_ND, index_N, clusters)
    after_KD, pairs = split_and_merge(TensorRows(x_ND), index_N, before_KD, clusters, group, first_row=0)
    assert pairs >= 2, "two clusters are empty: free places"
    assert torch.equal(before_KD, _means(x_ND, index_N, clusters)), "left as it is"
    x, has_N = x_ND.double(), index_N >= 0
    own = (x * before_KD.double()[index_N.clamp_min(0)]).sum(1)[has_N].sum()
    assert own == pytest.approx(_objective(x_ND, index_N, clusters), abs=1e-4)
    best = (x @ after_KD.double().T).amax(1)[has_N].sum()
    assert best > own + pairs * 1e-3
    assert (after_KD.norm(dim=1) - 1).abs().max() < 1e-5


def test_two_persons_in_one_cluster_and_one_in_two(group: dist.ProcessGroup) -> None:
    x_ND, y_N = _faces(5, 20, 32, noise=0.6)
    index_N = torch.tensor([0, 0, 1, 2, 3])[y_N]  # persons 0 and 1 share a cluster
    index_N[y_N == 4] = torch.where(torch.arange(20) < 10, 3, 4)  # person 4 has two
    centres_KD, pairs = split_and_merge(TensorRows(x_ND), index_N, _means(x_ND, index_N, 5), 5, group, first_row=0)
    assert pairs == 1
    cluster_N = assign(x_ND, centres_KD)[1]
    assert len({(int(y), int(k)) for y, k in zip(y_N, cluster_N, strict=True)}) == 5
    assert split_and_merge(TensorRows(x_ND), cluster_N, _means(x_ND, cluster_N, 5), 5, group, first_row=0)[1] == 0


def test_choice_of_pairs() -> None:
    loss_K, partner_K = np.array([0.5, 0.1, 0.1, 0.0, 3.0, 9.0]), np.array([1, 2, 1, 3, 0, 4])
    gain_K = np.array([-np.inf, 5.0, 0.3, -np.inf, 2.0, 1.0])
    # 3 is free: takes the best split, of 1. Then 1 is used; (0, 1) too; 4 with 0 would lose more than 5 gains.
    assert choose(loss_K, partner_K, gain_K).tolist() == [[3, 3, 1]]
    loss_K[4] = 0.2
    assert choose(loss_K, partner_K, gain_K).tolist() == [[3, 3, 1], [4, 0, 5]]
    assert choose(loss_K[:1], np.array([0]), gain_K[:1]).shape == (0, 3)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_one_cluster_and_clusters_of_one_row(group: dist.ProcessGroup, rows: int) -> None:
    x_ND = _unit(rows, 4)
    for clusters in {1, rows}:
        index_N = torch.arange(rows) % clusters
        means_KD = _means(x_ND, index_N, clusters)
        centres_KD, pairs = split_and_merge(TensorRows(x_ND), index_N, means_KD, clusters, group, first_row=0)
        assert pairs == 0
        assert torch.equal(centres_KD, means_KD)
