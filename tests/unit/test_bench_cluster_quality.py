"""Scores of a clustering against scikit-learn's, against plain loops, and at their ends."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cluster_quality import HEADER, cells, main, mean_cosine, mixture, ours, scores


@pytest.mark.parametrize("size", [2, 7, 123, 507])
def test_scores_against_plain_loops(size: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(size)
    person_N, cluster_N = generator.integers(0, 5, size) * 7, generator.integers(-1, 9, size)
    found = scores(person_N, cluster_N)
    assert found.nmi == pytest.approx(metrics.normalized_mutual_info_score(person_N, cluster_N), abs=1e-12)
    same_person, same_cluster = person_N[:, None] == person_N, cluster_N[:, None] == cluster_N
    both = (same_person & same_cluster).sum(1)
    precision, recall = (both / same_cluster.sum(1)).mean(), (both / same_person.sum(1)).mean()
    assert found.bcubed == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)
    pairs = both.sum() - size, same_person.sum() + same_cluster.sum() - 2 * size
    assert found.pairwise == pytest.approx(2 * pairs[0] / pairs[1] if pairs[1] else 1.0, abs=1e-12)


def test_the_truth_scores_one() -> None:
    for person_N in (np.arange(7), np.zeros(7, np.int64), np.arange(123) % 10):
        assert scores(person_N, person_N * 3 + 1) == pytest.approx((1, 1, 1))


def test_mixture_and_our_way() -> None:
    x_ND, person_N = mixture(600, 20, 64, seed=1)
    assert sorted(set(person_N.tolist())) == list(range(20))
    assert np.linalg.norm(x_ND, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(mixture(600, 20, 64, seed=1)[0], x_ND)
    assert mean_cosine(x_ND, person_N) == pytest.approx(0.66, abs=0.03)
    found = ours()(x_ND, 20, 0)
    assert scores(person_N, found.cluster_N).bcubed > 0.9
    assert mean_cosine(x_ND, found.cluster_N) > mean_cosine(x_ND, person_N) - 0.01


def test_cells() -> None:
    runs = [{"bcubed": b, "nmi": 0.5, "pairwise": 0.25, "mean_cosine": 0.7, "seconds": 2.0} for b in (0.5, 0.7)]
    row = cells({"data": "some", "way": "ours", "runs": runs})
    assert dict(zip(HEADER, row, strict=True))["BCubed F"] == "0.6000"
    assert row == ("some", "ours", "0.6000", "0.5000", "0.2500", "0.7000", "2", "0.5000")


@pytest.mark.parametrize("arguments", [["--people", "0"], ["--points", "10"], ["--embeddings", "x.npy"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
