"""The benchmark of planted faults: the plan plants what it says, and findings are judged by it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.clusters.label_noise_data import Plan, plant
from benchmarks.label_noise import Result, cells, compare, names_right
from clustering.report.findings import Copy, Duplicate, Findings, Noise, Split
from clustering.report.groups import Cut

PLAN = Plan(labels=200)
PLANTED = plant(PLAN, 5)


def test_shares_are_those_of_the_plan() -> None:
    p = PLANTED
    assert (p.label_N != p.home_N).sum() == round(0.1 * len(p.label_N))
    assert p.split_L.sum() == 10
    assert (p.twin_L >= 0).sum() == 8
    assert p.persons == 200 - 4 + 10
    firsts = (p.copy_N == 0).sum()
    assert (p.copy_N > 0).sum() == round(0.02 * firsts)
    assert (np.diff(p.label_N) >= 0).all()
    again = plant(PLAN, 5)
    assert all((one == other).all() for one, other in zip(p, again, strict=True))


def test_labels_hold_the_persons_that_the_plan_says() -> None:
    p = PLANTED
    for label in range(200):
        persons, counts = np.unique(p.person_N[(p.home_N == label) & (p.copy_N == 0)], return_counts=True)
        assert len(persons) == 1 + p.split_L[label]
        assert 10 <= counts.sum() <= 20
        assert not p.split_L[label] or counts.min() >= 0.29 * counts.sum() - 1
        twin = p.twin_L[label]
        others = np.unique(p.home_N[np.isin(p.person_N, persons)])
        assert others.tolist() == sorted({label, twin if twin >= 0 else label})
    moved = p.label_N != p.home_N
    assert (p.label_N[moved] != p.twin_L[p.home_N[moved]]).all()  # the same person under another label is no mistake


def _nothing() -> Findings:
    return Findings(
        noise=[], duplicates=[], splits=[], copies=[], labels=[], cut=Cut(within=0.6, across=0.0, stranger=0.3),
        noise_from=0.0, split=0.6, duplicate=0.9, iterations=1,
    )  # fmt: skip


def test_perfect_findings_have_full_marks() -> None:
    p = PLANTED
    found = _nothing()
    for sample in np.flatnonzero(p.label_N != p.home_N).tolist():
        found.noise.append(Noise(1.0, sample, int(p.label_N[sample]), "closed", int(p.home_N[sample]), 0, 1, True))
    for label in np.flatnonzero(p.twin_L > np.arange(200)).tolist():
        found.duplicates.append(Duplicate(1.0, label, int(p.twin_L[label]), 1.0, 10, 10))
    found.splits.extend(Split(1.0, int(label), 1, -1, (0,), 5) for label in np.flatnonzero(p.split_L))
    for sample in np.flatnonzero(p.copy_N).tolist():
        same = (p.person_N == p.person_N[sample]) & (p.image_N == p.image_N[sample]) & (p.copy_N == 0)
        found.copies.append(Copy(1.0, sample, 0, int(np.flatnonzero(same)[0]), 0))
    for result in compare(found, p, 5):
        assert result.precision_T[-1] == result.recall_T[-1] == 1
    assert names_right(found, p) == 1


def test_wrong_findings_cost_precision_and_missing_ones_recall() -> None:
    p = PLANTED
    found = _nothing()
    right = int(np.flatnonzero(p.label_N != p.home_N)[0])
    fine = int(np.flatnonzero(p.label_N == p.home_N)[0])
    found.noise.extend(Noise(1.0, sample, 0, "open", -1, 0, 0, False) for sample in (fine, right))
    noise, duplicates, *_ = compare(found, p, 5)
    assert noise.precision_T.tolist() == [0, 0.5]
    assert noise.recall_T[-1] == 1 / noise.planted
    assert cells(duplicates)[2:6] == ["4", "0", "—", "0.0"]


def test_precision_at_a_recall_is_of_the_shortest_beginning() -> None:
    result = Result("copies", 0, 4, np.array([True, False, True, True, False]))
    assert result.precision_at(0.5) == pytest.approx(2 / 3)
    assert result.precision_at(0.75) == pytest.approx(3 / 4)
    assert result.precision_at(0.9) is None
