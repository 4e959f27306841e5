"""`noise_gap`: suspects that lie about as near to their own class are let pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.kmeans import assign, class_mean_centres, spherical_kmeans
from clustering.method.gate import AT_HOME, clearly_elsewhere, suspects_of
from clustering.method.hardness import CountTable
from clustering.reference import dense_clear_suspects, dense_suspects
from configs.schema import ClusteringConfig, ConfigError
from partial_fc.collectives import all_reduce_
from sharding import shard_of
from tests.dist.clustering_cases import CASES, problem
from tests.dist.service_cases import NOISY, trained
from tests.ranks import WORLD_SIZES, RankPool

GAPS = (0.05, 0.2, 0.5)


def _clustered(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Embeddings, labels, clusters, cosines to their centres, C and K."""
    x_ND, labels_N, C, K = problem(CASES[name])
    found = spherical_kmeans(x_ND, labels_N, class_mean_centres(x_ND, labels_N, C, K), iterations=1)
    best_N, index_N = assign(x_ND, found.centres_KD)
    return x_ND, labels_N, index_N, best_N, C, K


def _clear(group: dist.ProcessGroup, name: str, gap: float) -> Tensor:
    """Over all samples, summed over the ranks."""
    x_ND, labels_N, index_N, best_N, C, K = _clustered(name)
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), C)
    mine = ((labels_N >= shard.start) & (labels_N < shard.stop)).nonzero()[:, 0]
    mine = mine[labels_N[mine].argsort(stable=True)]
    class_P, cluster_P = labels_N[mine], index_N[mine]
    table = CountTable.count(class_P, cluster_P, cluster_P >= 0, shard, C, K)
    dominant_K, _ = table.best_class(torch.ones_like(table.row_Q, dtype=torch.bool), group)
    clear_P = clearly_elsewhere(
        suspects_of(table, dominant_K, class_P, cluster_P),
        table,
        x_ND[mine],
        class_P,
        cluster_P,
        best_N[mine],
        gap=gap,
        sums_RD=torch.zeros(shard.size, x_ND.shape[1], dtype=torch.int64),
    )
    clear_N = torch.zeros(len(x_ND), dtype=torch.int64)
    clear_N[mine] = clear_P.long()
    return all_reduce_(clear_N, group).bool()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["labels confused", "long tail", "even"])
def test_equals_dense(ranks: RankPool, name: str, world_size: int) -> None:
    x_ND, labels_N, index_N, best_N, C, K = _clustered(name)
    suspect_N = dense_suspects(labels_N, index_N, C, K)
    left = []
    for gap in GAPS:
        expected_N = dense_clear_suspects(suspect_N, x_ND, labels_N, index_N, best_N, C, K, gap, AT_HOME)
        for found_N in ranks.run(world_size, _clear, name, gap):
            assert torch.equal(found_N, expected_N)
        left.append(int(expected_N.sum()))
    assert left == sorted(left, reverse=True)
    if name == "labels confused":
        assert int(suspect_N.sum()) >= left[0] > left[-1]


def test_a_sample_between_look_alikes_passes_and_a_mislabelled_one_does_not() -> None:
    first, second = F.normalize(torch.tensor([[1.0, 0.0, 0.4], [1.0, 0.0, -0.4]], dtype=torch.float64))
    between = F.normalize(torch.tensor([1.0, 0.0, -0.02], dtype=torch.float64), dim=0)
    x_PD = torch.stack([first, first, first, between, second, second, second, second])
    class_P = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])  # the first of the second's rows is mislabelled
    cluster_P = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    table = CountTable.count(class_P, cluster_P, cluster_P >= 0, shard_of(0, 1, 2), 2, 2)
    suspect_P = suspects_of(table, torch.tensor([0, 1]), class_P, cluster_P)
    assert suspect_P.nonzero()[:, 0].tolist() == [3, 4]
    clear_P = clearly_elsewhere(
        suspect_P,
        table,
        x_PD,
        class_P,
        cluster_P,
        x_PD @ second,
        gap=0.1,
        sums_RD=torch.zeros(2, 3, dtype=torch.int64),
    )
    assert clear_P.nonzero()[:, 0].tolist() == [4]


def _codes(group: dist.ProcessGroup, gap: float) -> Tensor:
    published = trained(group, NOISY, noise_gap=gap)._published
    assert published is not None
    return published.code_I


def test_the_service_lets_pass_alike_on_any_number_of_ranks(ranks: RankPool) -> None:
    codes = {}
    for gap in (0.0, 0.9, 2.0):
        (codes[gap],) = ranks.run(1, _codes, gap)
        for world_size in WORLD_SIZES[1:]:
            assert all(torch.equal(code_I, codes[gap]) for code_I in ranks.run(world_size, _codes, gap))
    suspects = {gap: int((code_I < 0).sum()) for gap, code_I in codes.items()}
    assert suspects[0.0] > suspects[0.9] > 0 == suspects[2.0]


def test_a_gap_that_is_no_difference_of_cosines_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise_gap"):
        ClusteringConfig(noise_gap=2.1)
