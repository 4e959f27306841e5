"""Searches among distractors are those of a loop; ties are never found; blocks make no difference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import normalize

from data.errors import DataError
from evaluation import distractors
from evaluation import identification as module
from evaluation.distractors import among_distractors
from evaluation.embed import files as embedding_files
from evaluation.embed.files import EmbeddingFile, read_labels
from evaluation.identification import best_scores, identification
from tests.ijb_cases import Array


def _files(folder: Path, probes: Array, others: Array) -> tuple[EmbeddingFile, EmbeddingFile]:
    np.save(folder / "probes.npy", probes)
    np.save(folder / "others.npy", others)
    return EmbeddingFile(folder / "probes.npy"), EmbeddingFile(folder / "others.npy")


def _looped(
    probes: Array, label: Array, others: Array, fpirs: tuple[float, ...]
) -> tuple[dict[int, float], list[float]]:
    x, y = normalize(probes.astype(np.float64)), normalize(others.astype(np.float64))
    found, best = [], [max(np.float32(a @ b) for b in y) for a in x]
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j and label[i] == label[j]:
                mate = np.float32(x[i] @ x[j])
                found.append((mate, sum(np.float32(x[i] @ b) >= mate for b in y)))
    rank = {k: float(np.mean([better < k for _, better in found])) for k in (1, 5, 10)}
    tpir = []
    for fpir in fpirs:
        thresholds = [t for t in [*best, *(m for m, _ in found), 2] if np.mean([b >= t for b in best]) <= fpir]
        tpir.append(max(float(np.mean([m >= t and not better for m, better in found])) for t in thresholds))
    return rank, tpir


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_figures_are_those_of_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int) -> None:
    monkeypatch.setattr(embedding_files, "_BLOCK", block)
    monkeypatch.setattr(module, "_PROBES", 1 + block % 50)
    monkeypatch.setattr(distractors, "_PAIRS", block)
    g = np.random.default_rng(2)
    label = g.integers(0, 9, 40)
    label[0] = 77  # alone
    probes = (g.standard_normal((100, 12))[label] + g.standard_normal((40, 12))).astype(dtype)
    others = g.standard_normal((90, 12)).astype(dtype)
    seen: list[int] = []
    files = _files(tmp_path, probes, others)
    found, alone = among_distractors(files[0], label, files[1], fpirs=(0.05, 0.2, 0.5), progress=seen.append)
    rank, tpir = _looped(probes, label, others, (0.05, 0.2, 0.5))
    assert found.rank == rank
    assert [entry.tar for entry in found.tpir] == tpir
    assert 0 < found.rank[1] < found.rank[10]
    _, sizes = np.unique(label, return_counts=True)
    assert (found.mated, found.non_mated) == (int((sizes * (sizes - 1)).sum()), 40)
    assert alone == int((sizes == 1).sum()) >= 1
    assert sum(seen) == 90


def test_a_tie_is_not_found(tmp_path: Path) -> None:
    probes = np.array([[1.0, 1.0], [1.0, 0.9]])
    copies = 3 * np.repeat(probes[1:], 2, axis=0)  # as near as the mate, of other length
    files = _files(tmp_path, probes, copies)
    found, _ = among_distractors(files[0], np.zeros(2, np.int64), files[1], fpirs=(0.5,))
    assert found.rank == {1: 0.0, 5: 1.0, 10: 1.0}
    assert found.tpir[0].tar == 0
    assert identification(*_two(0.5), fpirs=(0.5,)).rank[1] == 0


def _two(other: float) -> tuple[Array, Array, Array, Array]:
    """One search for a mate of score 0.5 among others."""
    others = np.full((1, 10), -np.inf, np.float32)
    others[0, 0] = other
    return np.array([0.5], np.float32), others, np.zeros(1, np.int64), np.array([0.1, 0.6], np.float32)


def test_the_threshold_of_a_search() -> None:
    found = identification(*_two(0.4), fpirs=(0.5, 0.99))
    assert [entry.tar for entry in found.tpir] == [1, 1]  # one of the two may reach it
    mate, others, probe, alone = _two(0.4)
    found = identification(mate, others, probe, np.array([0.1, 0.45], np.float32), fpirs=(0.5,))
    assert (found.tpir[0].tar, found.tpir[0].threshold) == (1, pytest.approx(0.45))
    below = identification(mate, others, probe, alone, fpirs=(0.01,)).tpir[0]
    assert math.isnan(below.tar)
    assert below.reason == "FPIR 0.01 needs at least 100 searches of persons not there, there are 2"


@pytest.mark.parametrize("first", [0, 3])
def test_an_entry_may_be_left_out(first: int) -> None:
    x = normalize(np.random.default_rng(0).standard_normal((6, 5)))
    blocks = [(0, x[:first]), (first, x[first:])] if first else [(0, x)]
    found = best_scores(x, blocks, 8, leave_out_Q=np.array([0, 1, 2, 3, -1, 4]))
    for probe, out in enumerate([0, 1, 2, 3, -1, 4]):
        expected = sorted((float(np.float32(x[probe] @ x[n])) for n in range(6) if n != out), reverse=True)
        assert found[probe, : len(expected)].tolist() == pytest.approx(expected, abs=1e-7)
        assert np.isneginf(found[probe, len(expected) :]).all()


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    files = _files(tmp_path, np.eye(3), np.eye(3))
    with pytest.raises(DataError, match="expected a person with two images, found none"):
        among_distractors(files[0], np.arange(3), files[1])
    mate, others, probe, alone = _two(0.4)
    for bad, match in (({"ranks": (0,)}, "ranks"), ({"ranks": (11,)}, r"1 … 10"), ({"fpirs": (1.0,)}, "FPIR")):
        with pytest.raises(ValueError, match=match):
            identification(mate, others, probe, alone, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one search"):
        identification(mate[:0], others, probe[:0], alone)
    np.save(tmp_path / "others.npy", np.array([[1.0, 0, 0], [0, math.nan, 0]]))
    with pytest.raises(DataError, match=r"others.npy: row 1: .*not finite"):
        among_distractors(files[0], np.zeros(3, np.int64), EmbeddingFile(tmp_path / "others.npy"))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.arange(4), "expected a label for each of 3 embeddings, found 4"),
        (np.ones(3), "expected labels, whole numbers .*found float64"),
        (np.ones((3, 1), np.int64), r"found int64 of shape \(3, 1\)"),
        (np.full(3, 2**63, np.uint64), r"expected labels below 2\^63"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: Array, match: str) -> None:
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=match):
        read_labels(tmp_path / "labels.npy", 3)
