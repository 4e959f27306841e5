"""The report's findings on embeddings with known faults, its statistics against plain float64, and its CSV files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from clustering.job.together import InputError
from clustering.report.copies import NEARLY_THE_SAME, find_copies
from clustering.report.data import labelled
from clustering.report.findings import Copy, Duplicate, Findings, LabelState, Noise, Split
from clustering.report.findings_csv import FILES, read_table, table_text
from clustering.report.groups import LARGEST, PRIOR_PAIRS, Cut, decide_cut, group_labels
from clustering.report.persons import Same, between, established, nearest_pairs
from clustering.service.parts import PartFiles
from tests.findings_cases import Case, found_by_rank, load, persons
from tests.ranks import RankPool

CUT = Cut(within=0.55, across=0.0, stranger=0.3)


def find(ranks: RankPool, folder: Path, case: Case, num_labels: int | None = None) -> Findings:
    found: Findings = ranks.run(1, found_by_rank, str(folder), case, num_labels)[0]
    return found


def test_each_fault_is_found_and_nothing_else(ranks: RankPool, tmp_path: Path) -> None:
    case = persons(60, 12)
    label_N, x_ND = case.label_N.copy(), case.x_ND.copy()
    label_N[case.person_N == 1] = 0  # two persons under label 0; label 1 is empty
    label_N[np.flatnonzero(case.person_N == 2)[:6]] = 1  # person 2 under labels 1 and 2
    wrong = np.flatnonzero(case.person_N >= 10)[::41]
    label_N[wrong] = 10 + (label_N[wrong] - 10 + 7) % 50
    copies = [(130, 121), (700, 255)]  # the second across labels
    for copy, original in copies:
        x_ND[copy] = x_ND[original]
    found = find(ranks, tmp_path, Case(x_ND, case.person_N, label_N))

    assert {row.sample for row in found.noise} == {*wrong.tolist(), 700}
    right = {sample: case.person_N[sample] for sample in wrong.tolist()} | {700: 255 // 12}
    assert all(row.kind == "closed" and row.looks_like == right[row.sample] for row in found.noise)
    assert [(row.label, row.other_label) for row in found.duplicates] == [(1, 2)]
    assert found.duplicates[0].ratio == pytest.approx(1, abs=0.15)
    assert [(row.label, row.group, len(row.samples), row.looks_like) for row in found.splits] == [(0, 1, 12, -1)]
    assert found.splits[0].score == pytest.approx(1, abs=0.4)
    assert [(row.sample, row.copy_of) for row in found.copies] == [(700, 255), (130, 121)]  # across labels first
    assert [row.score for row in found.noise] == sorted((row.score for row in found.noise), reverse=True)
    assert sorted(row.label for row in found.labels) == list(range(60))
    assert sum(row.suspects for row in found.labels) == len(found.noise)


def test_clean_labels_give_no_findings_and_equal_input_equal_findings(ranks: RankPool, tmp_path: Path) -> None:
    case = persons(50, 9, seed=3)
    found = find(ranks, tmp_path, case)
    assert not found.noise
    assert not found.duplicates
    assert not found.splits
    assert not found.copies
    assert found == find(ranks, tmp_path, case)


def test_a_person_of_no_label_is_open_noise(ranks: RankPool, tmp_path: Path) -> None:
    case = persons(40, 10, seed=1)
    x_ND = case.x_ND.copy()
    x_ND[5] = np.linalg.svd(x_ND[case.person_N != 0])[2][-1]  # the direction in which all others lie least
    found = find(ranks, tmp_path, Case(x_ND, case.person_N, case.label_N))
    assert [(row.sample, row.kind, row.looks_like) for row in found.noise] == [(5, "open", -1)]


def test_labels_without_evidence_say_nothing(ranks: RankPool, tmp_path: Path) -> None:
    case = persons(30, 8, seed=2)
    keep = (case.person_N != 4) | (np.arange(240) == 32)  # one image of person 4
    few = Case(case.x_ND[keep], case.person_N[keep], case.label_N[keep])
    found = find(ranks, tmp_path, few, num_labels=33)  # three labels without samples
    assert not found.noise
    assert [row.samples for row in found.labels if row.label in (4, 31)] in ([1, 0], [0, 1])


def test_embeddings_that_hardly_tell_labels_apart_are_said_to(ranks: RankPool, tmp_path: Path) -> None:
    case = persons(41, 3, dim=7, spread=2.0, seed=2)
    found = find(ranks, tmp_path, case)
    assert not found.cut.separates
    for row in found.noise:
        assert np.isfinite([row.score, row.own, row.other]).all()


def test_labels_no_closer_than_strangers_are_an_error(tmp_path: Path) -> None:
    case = persons(40, 10)
    shuffled_N = np.random.default_rng(0).permutation(case.label_N)
    with pytest.raises(InputError, match="is row i of sample i"):
        decide_cut(load(tmp_path, case._replace(label_N=shuffled_N)))


@pytest.mark.parametrize("dim", [1, 7, 123, 252, 507])
def test_ratio_of_groups_equals_plain_float64(tmp_path: Path, dim: int) -> None:
    case = persons(6, 7, dim=dim, seed=dim)
    data = load(tmp_path, case)
    groups = established(data, np.zeros(42, dtype=np.int64), CUT)
    x_ND = case.x_ND.astype(np.float64) / np.linalg.norm(case.x_ND.astype(np.float64), axis=1, keepdims=True)

    def own(label: int) -> float:
        cosines = [x_ND[i] @ x_ND[j] for i, j in itertools.combinations(np.flatnonzero(case.label_N == label), 2)]
        return max((sum(cosines) + PRIOR_PAIRS * CUT.within) / (len(cosines) + PRIOR_PAIRS), 1e-3)

    for first, second in itertools.combinations(range(6), 2):
        across = np.mean(x_ND[case.label_N == first] @ x_ND[case.label_N == second].T)
        expected = across / np.sqrt(own(first) * own(second))
        ratio = between(groups, np.array([first]), np.array([second]))[0]
        assert ratio == pytest.approx(expected, abs=2e-6)


def pairs_by_rank(group: dist.ProcessGroup, folder: str, case: Case) -> Same:
    return nearest_pairs(established(load(Path(folder), case), np.zeros(len(case.label_N), dtype=np.int64), CUT), group)


def test_pairs_stand_out_from_what_is_around_them(ranks: RankPool, tmp_path: Path) -> None:
    """The contrast of every pair against plain float64 over all labels."""
    case = persons(9, 6, dim=5, seed=1)
    same = ranks.run(1, pairs_by_rank, str(tmp_path), case)[0]
    groups = established(load(tmp_path, case), np.zeros(54, dtype=np.int64), CUT)
    every = np.arange(9)
    ratio = between(groups, every.repeat(9), np.tile(every, 9)).reshape(9, 9)

    def around(label: int, but: int) -> float:
        return float(np.mean(sorted(ratio[label, [one for one in every if one not in (label, but)]])[-5:]))

    assert len(same.ratio_Q) == 36
    for first, second, contrast in zip(same.first_Q, same.second_Q, same.contrast_Q, strict=True):
        expected = ratio[first, second] - (around(first, second) + around(second, first)) / 4
        assert contrast == pytest.approx(expected, abs=1e-12)
    assert (np.diff(same.contrast_Q) <= 0).all()
    for label in every:
        nearest = max((one for one in every if one != label), key=lambda one: ratio[label, one])
        assert same.best_G[label] == pytest.approx(ratio[label, nearest] - around(label, nearest) / 2, abs=1e-12)


def test_ratio_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """Unbiased: one person in two labels of 4 and 200 images, many times; the mean ratio is 1."""
    ratios = []
    for seed in range(60):
        case = persons(1, 204, seed=seed)
        data = load(tmp_path, case._replace(label_N=(np.arange(204) >= 4).astype(np.int64)))
        groups = established(data, np.zeros(204, dtype=np.int64), CUT)
        ratios.append(float(between(groups, np.array([0]), np.array([1]))[0]))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def test_groups_are_average_linkage_up_to_the_cut(tmp_path: Path) -> None:
    """Against merging by hand, the closest pair of groups first."""
    case = persons(3, 9, spread=1.2, seed=5)
    data = load(tmp_path, case._replace(label_N=np.zeros(27, dtype=np.int64)), 2)
    cut = Cut(within=0.5, across=0.0, stranger=0.3)
    cos = data.x_PD.astype(np.float64) @ data.x_PD.T.astype(np.float64)
    parts = [[row] for row in range(27)]
    while len(parts) > 1:
        means = {
            (a, b): cos[np.ix_(parts[a], parts[b])].mean() for a, b in itertools.combinations(range(len(parts)), 2)
        }
        (a, b), best = max(means.items(), key=lambda item: item[1])
        if best < cut.cosine:
            break
        parts[a] += parts.pop(b)
    group_P = group_labels(data, cut).group_P
    assert {frozenset(part) for part in parts} == {
        frozenset(np.flatnonzero(group_P == group).tolist()) for group in range(group_P.max() + 1)
    }
    assert (np.diff(np.bincount(group_P)) <= 0).all()  # the largest is 0


def test_a_label_larger_than_linkage_takes_is_grouped_too(tmp_path: Path) -> None:
    case = persons(2, LARGEST, dim=16, spread=0.6, seed=0)
    data = load(tmp_path, case._replace(label_N=np.zeros(2 * LARGEST, dtype=np.int64)), 2)
    group_P = group_labels(data, Cut(within=0.7, across=0.0, stranger=0.3)).group_P
    for person in range(2):
        _, counts = np.unique(group_P[case.person_N == person], return_counts=True)
        assert counts.max() > 0.97 * LARGEST
    assert len(np.unique(group_P[[0, LARGEST]])) == 2


def test_the_cut_lies_between_strangers_and_what_is_usual(tmp_path: Path) -> None:
    cut = decide_cut(load(tmp_path, persons(80, 12, spread=0.9)))
    assert cut.within == pytest.approx(1 / (1 + 0.81), abs=0.02)
    assert cut.across == pytest.approx(0, abs=0.01)
    assert cut.separates


def test_copies_of_copies_belong_to_the_first_that_is_not_suspect(tmp_path: Path) -> None:
    case = persons(20, 5)
    x_ND = case.x_ND.copy()
    x_ND[[7, 9, 33]] = x_ND[2]
    nearly = x_ND[60] + 0.1 * (x_ND[61] - x_ND[60])
    x_ND[61] = nearly / np.linalg.norm(nearly)
    data = load(tmp_path, case._replace(x_ND=x_ND))
    suspect_P = np.isin(data.sample_P, [2])
    found = find_copies(data, np.zeros(100, dtype=np.int64), suspect_P)
    pairs = [(int(data.sample_P[a]), int(data.sample_P[b])) for a, b in zip(found.place_T, found.of_T, strict=True)]
    assert pairs == [(2, 7), (9, 7), (33, 7), (61, 60)]
    assert found.cosine_T[:3] == pytest.approx(1)
    assert NEARLY_THE_SAME <= found.cosine_T[3] < 1


@pytest.mark.parametrize(
    ("x_ND", "label_N", "words"),
    [
        (np.ones((3, 2), np.float32), np.zeros(4, np.int64), "expected a row for each of 4 labels, got 3"),
        (np.ones((2, 2), np.float32), np.array([0, 5]), "expected 0 … 1, got 0 … 5"),
        (np.array([[1, 0], [np.nan, 1]], np.float32), np.zeros(2, np.int64), "row 1 of .* expected finite numbers"),
        (np.zeros((2, 2), np.float16), np.zeros(2, np.int64), "at least one row that is not all zeros"),
    ],
)
def test_bad_embeddings_are_one_line(tmp_path: Path, x_ND: object, label_N: object, words: str) -> None:
    np.save(tmp_path / "x.npy", x_ND)
    with pytest.raises(InputError, match=words) as caught:
        labelled(PartFiles(tmp_path / "x.npy"), label_N, 2)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_rows_of_zeros_take_no_part_and_lengths_do_not_matter(tmp_path: Path) -> None:
    x_ND = np.array([[0, 3e-4], [0, 0], [-2e4, 0]], np.float16)
    np.save(tmp_path / "x.npy", x_ND)
    data = labelled(PartFiles(tmp_path / "x.npy"), np.array([1, 0, 0]), 2)
    assert data.without.tolist() == [1]
    assert data.sample_P.tolist() == [2, 0]
    assert data.x_PD == pytest.approx(np.array([[-1, 0], [0, 1]]), abs=1e-7)


@pytest.mark.parametrize("label_N", [np.zeros(5, np.int64), np.arange(5)])
def test_nothing_to_compare_is_said(tmp_path: Path, label_N: np.ndarray) -> None:
    case = persons(1, 5)
    with pytest.raises(InputError, match="there is nothing to compare"):
        decide_cut(load(tmp_path, case._replace(label_N=label_N), 5))


ROWS = {
    "noise.csv": [Noise(0.5, 3, 1, "closed", 2, 0.25, 1.0, True), Noise(0.25, 9, 0, "open", -1, -0.5, 0.125, False)],
    "duplicates.csv": [Duplicate(0.5, 1, 2, 0.9375, 10, 11)],
    "splits.csv": [Split(0.75, 4, 1, -1, (3, 5, 8), 9)],
    "copies.csv": [Copy(1.0, 5, 1, 3, 1, None), Copy(0.875, 6, 1, 3, 2, False)],
    "classes.csv": [LabelState(1, 10, 0.5, 0.75, 0.25, 2, 1, 0)],
}


@pytest.mark.parametrize("name", FILES)
def test_csv_files_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = table_text(FILES[name], ROWS[name])
    path.write_text("\ufeff" + text.replace("\n", "\r\n") + "\r\n,,\r\n", encoding="utf-8")  # as a spreadsheet saves it
    assert read_table(path, FILES[name]) == ROWS[name]
    path.write_text(text.partition("\n")[0], encoding="utf-8")
    assert read_table(path, FILES[name]) == []


DUPLICATES = "score,label,other_label,ratio,samples,other_samples\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the columns"),
        ("score;label;other_label;samples;other_samples\n", "separate by commas"),
        (DUPLICATES.strip() + ",mine\n", "expected the columns"),
        (DUPLICATES + "1,2,3,4\n", "line 2: expected 6 cells, got 4"),
        (
            "score,label,other_label,ratio,samples,other_samples\n1,2,x,0.9,4,5\n",
            "line 2: other_label: expected a whole number",
        ),
        (DUPLICATES + "nan,2,3,0.9,4,5\n", "line 2: score: expected a number"),
        (
            "score,label,other_label,ratio,samples,other_samples\n1,99999999999999999,3,0.9,4,5\n",
            "expected a whole number",
        ),
        (DUPLICATES + "1,2,3,0.9,4,\xff\n", "not CSV in UTF-8"),
    ],
)
def test_foreign_csv_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "duplicates.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words) as caught:
        read_table(path, Duplicate)
    assert "\n" not in str(caught.value)


def test_a_missing_csv_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name the folder that `report --out` wrote"):
        read_table(tmp_path / "noise.csv", Noise)
