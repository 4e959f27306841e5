"""The readable k-means: each step does what its description says."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clustering.kmeans import assign, class_mean_centres, seeds, spherical_kmeans, unit_means


def _blobs(counts: list[int], dim: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres_CD = F.normalize(torch.randn(len(counts), dim, generator=generator, dtype=torch.float64))
    noise_ND = torch.randn(len(labels_N), dim, generator=generator, dtype=torch.float64)
    return F.normalize(centres_CD[labels_N] + spread * noise_ND), labels_N


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_assignment_is_the_nearest_centre_whatever_the_chunk(chunk: int) -> None:
    x_ND, _ = _blobs([20, 3, 14], 5, 0.5)
    centres_KD, _ = _blobs([1] * 11, 5, 0.1, seed=3)
    best_N, index_N = assign(x_ND, centres_KD, chunk=chunk)
    for x_D, best, index in zip(x_ND, best_N, index_N, strict=True):
        cosines = [float(F.cosine_similarity(x_D, c_D, dim=0)) for c_D in centres_KD]
        assert cosines[index] == max(cosines) == pytest.approx(float(best))


def test_ties_go_to_the_smaller_index_and_zero_rows_attract_nothing() -> None:
    x_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    centres_KD = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    best_N, index_N = assign(x_ND, centres_KD)
    assert index_N.tolist() == [1, 1], "cosine 0 with both: the first; never the row that is no centre"
    assert best_N.tolist() == [0, 0]
    best_N, index_N = assign(x_ND, torch.zeros(3, 2))
    assert index_N.tolist() == [-1, -1]
    assert best_N.tolist() == [float("-inf")] * 2


def test_seeds_are_the_worst_point_of_each_class_worst_class_first() -> None:
    best_N = torch.tensor([0.9, 0.2, 0.1, 0.5, 0.5, 0.3])
    classes_N = torch.tensor([0, 0, 0, 1, 1, 2])
    counted_N = torch.tensor([True, True, False, True, True, True])
    index_N = torch.tensor([0, 0, 1, 2, 2, 2])
    # Clusters 1 (its only point does not count), 3 and 4 are empty; the candidates by cosine are 1, 5 and 3.
    assert seeds(best_N, index_N, classes_N, counted_N, 5) == [(1, 1), (5, 3), (3, 4)]
    assert seeds(best_N, index_N, classes_N, counted_N, 9) == [(1, 1), (5, 3), (3, 4)], "no candidate twice"
    best_N[5] = 0.9999
    assert seeds(best_N, index_N, classes_N, counted_N, 5) == [(1, 1), (3, 3)], "class 2 sits on its centre"


def test_centres_are_unit_means_of_counted_members() -> None:
    x_ND, labels_N = _blobs([6, 4, 1], 7, 0.8)
    counted_N = torch.ones_like(labels_N, dtype=torch.bool)
    counted_N[[0, 10]] = False
    before_KD = F.normalize(torch.ones(3, 7, dtype=torch.float64))
    centres_KD = unit_means(x_ND, labels_N, counted_N, before_KD)
    assert torch.allclose(centres_KD.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(centres_KD[0], F.normalize(x_ND[1:6].sum(0), dim=0))
    assert torch.equal(centres_KD[2], before_KD[2]), "no counted member: stays"


def test_fragmented_class_gets_the_extra_cluster() -> None:
    """Class 0 has two far modes; its mean fits neither, and after two iterations each mode has a cluster."""
    x_ND, modes_N = _blobs([12, 5, 9, 8, 10], 24, 0.05)
    classes_N = torch.tensor([0, 0, 1, 2, 3])[modes_N]
    start_KD = class_mean_centres(x_ND, classes_N, 4, 5)
    assert (start_KD[4] == 0).all()
    result = spherical_kmeans(x_ND, classes_N, start_KD, iterations=2)
    for mode in range(5):
        assert len(result.index_N[modes_N == mode].unique()) == 1
    assert len(result.index_N.unique()) == 5


def test_objective_never_falls() -> None:
    x_ND, labels_N = _blobs([9] * 12, 6, 0.7)
    centres_KD = class_mean_centres(x_ND, labels_N, 12, 12)
    fits = []
    for _ in range(6):
        fits.append(float(assign(x_ND, centres_KD)[0].sum()))
        centres_KD = spherical_kmeans(x_ND, labels_N, centres_KD, iterations=1).centres_KD
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(fits))
    assert fits[-1] > fits[0]


@pytest.mark.parametrize("clusters", [3, 40])
def test_more_clusters_than_points_and_classes_without_points_stay_finite(clusters: int) -> None:
    x_ND, labels_N = _blobs([2, 0, 3], 4, 0.3)
    start_KD = class_mean_centres(x_ND, labels_N, 3, clusters)
    result = spherical_kmeans(x_ND, labels_N, start_KD, iterations=4)
    assert torch.isfinite(result.centres_KD).all()
    assert ((result.index_N >= 0) & (result.index_N < clusters)).all()


def test_points_that_the_gate_leaves_out_move_no_centre() -> None:
    x_ND, labels_N = _blobs([8, 8], 5, 0.3)
    out_N = torch.zeros_like(labels_N, dtype=torch.bool)
    out_N[[1, 9]] = True
    start_KD = class_mean_centres(x_ND, labels_N, 2, 2)
    with_them = spherical_kmeans(x_ND, labels_N, start_KD, iterations=3, gate=lambda _: ~out_N)
    without = spherical_kmeans(x_ND[~out_N], labels_N[~out_N], start_KD, iterations=3)
    assert torch.allclose(with_them.centres_KD, without.centres_KD, atol=1e-14)
