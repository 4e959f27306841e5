"""IJB: templates, scores and rates are the peer's recorded ones, scikit-learn's and those of plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve
from sklearn.preprocessing import normalize

from data.errors import DataError
from evaluation.embed import files as embedding_files
from evaluation.embed.files import EmbeddingFile, unit
from evaluation.ijb import pair_scores
from evaluation.ijb.files import Pairs, read_images, read_persons
from evaluation.ijb.ijb import joined, one_to_many, one_to_one
from evaluation.ijb.templates import Templates, pooled, pooled_plainly
from evaluation.roc import nearest_tars, roc_of, tar_at_far
from tests.ijb_cases import Array, Case, made_up, write

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors"


def _pooled(folder: Path, x_ND: Array, template_N: Array, media_N: Array, **options: object) -> Templates:
    np.save(folder / "x.npy", x_ND)
    halves = bool(options.pop("halves", False))
    return pooled(EmbeddingFile(folder / "x.npy", halves=halves), template_N, media_N, **options)  # type: ignore[arg-type]


# ---- the peer's numbers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, Array]:
    with np.load(VECTORS / "ijb.npz") as file, np.load(VECTORS / "ijb_images_1000.npz") as rest:
        found = {name: file[name] for name in file}
        found["image_features"] = np.concatenate([file["image_features"], rest["image_features"]])
    assert found["image_features"].shape == (2000, 32)
    return found


def test_templates_scores_and_rates_are_the_peers(tmp_path: Path, recorded: dict[str, Array]) -> None:
    ids = recorded["template_ids"].astype(np.int64), recorded["media_ids"].astype(np.int64)
    templates = _pooled(tmp_path, recorded["image_features"], *ids)
    np.testing.assert_allclose(templates.unit_TD[:20], recorded["first_templates"], rtol=0, atol=1e-14)
    first, second = (np.searchsorted(templates.ids_T, recorded[name]) for name in ("p1", "p2"))
    for way in (pair_scores.pair_scores, pair_scores.scores_plainly):
        scores = way(templates.unit_TD, first, second)
        np.testing.assert_allclose(scores[:200], recorded["first_scores"], rtol=0, atol=1e-14)
    fars = tuple(recorded["tar"][:, 0].tolist())
    found = one_to_one(templates, Pairs(first, second, recorded["label"] == 1), fars=fars)
    assert list(found.nearest) == recorded["tar"][:, 1].tolist()
    far, tar, _ = roc_curve(recorded["label"], scores)
    for entry in found.tar_at_far:
        assert entry.tar == tar[far <= entry.far].max()


# ---- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 4096])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pooling_is_that_of_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shuffled: bool, block: int
) -> None:
    monkeypatch.setattr(embedding_files, "_BLOCK", block)
    case = made_up()
    order = np.random.default_rng(1).permutation(len(case.x_ND)) if shuffled else np.arange(len(case.x_ND))
    x, template, media, score = (a[order] for a in (case.x_ND, case.template_N, case.media_N, case.score_N))
    x = x.astype(dtype)
    wide = x.astype(np.float64)
    seen: list[int] = []
    for options, given in (
        ({}, wide),
        ({"weight_N": score}, wide * score[:, None]),
        ({"unit_images": True}, normalize(wide)),
        ({"unit_images": True, "weight_N": score}, normalize(wide) * score[:, None]),
    ):
        found = _pooled(tmp_path, x, template, media, progress=seen.append, **options)
        expected = pooled_plainly(given, template, media)
        assert found.ids_T.tolist() == expected.ids_T.tolist() == sorted(case.person)
        np.testing.assert_allclose(found.unit_TD, expected.unit_TD, rtol=0, atol=1e-14)
    assert sum(seen) == 4 * len(x)


def test_halves_are_summed_before_anything_else(tmp_path: Path) -> None:
    case = made_up()
    sides = case.x_ND[:, :8], case.x_ND[:, 8:]
    for unit_images in (False, True):
        found = _pooled(tmp_path, case.x_ND, case.template_N, case.media_N, halves=True, unit_images=unit_images)
        expected = _pooled(tmp_path, sides[0] + sides[1], case.template_N, case.media_N, unit_images=unit_images)
        np.testing.assert_array_equal(found.unit_TD, expected.unit_TD)


def test_frames_of_a_video_have_one_vote(tmp_path: Path) -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = _pooled(tmp_path, x, np.zeros(4, np.int64), np.array([5, 6, 6, 6]))
    np.testing.assert_allclose(found.unit_TD, [[math.sqrt(0.5), math.sqrt(0.5)]], rtol=1e-15)


def test_lengths_beyond_what_squares_hold() -> None:
    x = np.array([[3e200, 4e200], [3e-200, 4e-200], [3, 4]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8]] * 3, rtol=1e-15)


# ---- scores of pairs and their rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 40, 1 << 22])
@pytest.mark.parametrize(("templates", "pairs"), [(40, 900), (40, 1), (7, 200), (1, 3)])
def test_products_give_the_scores_of_single_pairs(
    monkeypatch: pytest.MonkeyPatch, templates: int, pairs: int, cells: int
) -> None:
    monkeypatch.setattr(pair_scores, "_CELLS", cells)
    monkeypatch.setattr(pair_scores, "_CELLS_A_PAIR", 10**9)  # always the product
    monkeypatch.setattr(pair_scores, "_PAIRS", 13)
    g = np.random.default_rng(pairs)
    x = normalize(g.standard_normal((templates, 123)))
    first, second = g.integers(0, templates, (2, pairs)).astype(np.int32)
    found = pair_scores.pair_scores(x, first, second)
    np.testing.assert_allclose(found, (x[first] * x[second]).sum(1), rtol=0, atol=2e-15)
    np.testing.assert_allclose(pair_scores.scores_plainly(x, first, second), found, rtol=0, atol=2e-15)


def test_few_pairs_of_many_templates_are_scored_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normalize(np.random.default_rng(0).standard_normal((100, 8)))
    monkeypatch.setattr(pair_scores, "_CELLS", -1)  # a product would fail
    rows = np.arange(50)
    assert pair_scores.pair_scores(x, rows, rows + 50).shape == (50,)
    with pytest.raises(ValueError, match="two rows of one length"):
        pair_scores.pair_scores(x, rows, rows[:-1])


@pytest.mark.parametrize("distinct", [10**6, 50, 4])
@pytest.mark.parametrize("seed", range(4))
def test_rates_are_those_of_scikit_learn(seed: int, distinct: int) -> None:
    g = np.random.default_rng(seed)
    same = g.random(3000) < 0.1
    scores = np.round((g.standard_normal(3000) + 2 * same) * distinct) / distinct
    roc = roc_of(scores, same)
    far, tar, threshold = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_array_equal(roc.far_T, far)
    np.testing.assert_array_equal(roc.tar_T, tar)
    np.testing.assert_array_equal(roc.threshold_T, threshold)
    few_far, few_tar, _ = (side[::-1] for side in roc_curve(same, scores))
    for asked in (1e-3, 1e-2, 0.017, 0.1, 0.5):
        found = tar_at_far(roc, asked)
        assert found.tar == tar[far <= asked].max()
        assert (
            nearest_tars(roc, [asked])[0]
            == few_tar[min(range(len(few_far)), key=lambda n: (abs(few_far[n] - asked), n))]
        )


def test_the_nearest_point_of_a_short_roc() -> None:
    roc = roc_of(np.array([0.5, 0.5]), np.array([True, False]))
    assert nearest_tars(roc, (1e-4, 0.9)) == (0, 1)
    parted = roc_of(np.array([0.9, 0.1]), np.array([True, False]))
    assert nearest_tars(parted, (1e-4,)) == (1,)


def test_planted_pairs_have_planted_rates(tmp_path: Path) -> None:
    """Angles are chosen so that each rate is known without counting."""
    angles = np.concatenate([[0.0], np.linspace(0.1, 3, 1001)])
    np.save(tmp_path / "x.npy", 7 * np.column_stack([np.cos(angles), np.sin(angles)]))
    ids = np.arange(1002)
    templates = pooled(EmbeddingFile(tmp_path / "x.npy"), ids, ids)
    second = np.arange(1, 1002)
    same = second == 12  # the twelfth nearest: eleven impostors come before it
    found = one_to_one(templates, Pairs(np.zeros(1001, np.int64), second, same), fars=(1e-3, 0.01, 0.011, 0.1))
    assert [entry.tar for entry in found.tar_at_far] == [0, 0, 1, 1]
    assert found.tar_at_far[2].threshold == pytest.approx(math.cos(angles[12]), abs=1e-14)


# ---- 1:N -----------------------------------------------------------------------------------------------------------


def _searched(case: Case, templates: Templates, gallery: Array) -> tuple[dict[int, float], list[float], int, int]:
    """Rank-k and TPIR by a loop over probes and thresholds."""
    row = {int(template): number for number, template in enumerate(templates.ids_T)}
    mated, alone = [], []
    for probe in case.probes:
        score = {
            case.person[int(t)]: np.float32(templates.unit_TD[row[int(t)]] @ templates.unit_TD[row[int(probe)]])
            for t in gallery
        }
        mine = score.pop(case.person[int(probe)], None)
        if mine is None:
            alone.append(max(score.values()))
        else:
            mated.append((mine, sum(other >= mine for other in score.values())))
    rank = {k: float(np.mean([better < k for _, better in mated])) for k in (1, 5, 10)}
    tpir = []
    for fpir in (0.05, 0.3):
        allowed = [t for t in [*alone, *(m for m, _ in mated), 2] if np.mean([a >= t for a in alone]) <= fpir]
        tpir.append(max(np.mean([m >= t and not better for m, better in mated]) for t in allowed))
    return rank, tpir, len(mated), len(alone)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_searches_are_those_of_a_loop(tmp_path: Path, noise: float) -> None:
    case = made_up(30, noise=noise, seed=3)
    paths = write(case, tmp_path)
    images = read_images(paths["media"])
    templates = pooled(EmbeddingFile(paths["x"]), images.template_N, images.media_N)
    galleries = [read_persons(paths[name], templates.ids_T, paths["media"]) for name in ("g1", "g2")]
    probes = read_persons(paths["probes"], templates.ids_T, paths["media"])
    assert len(probes.row_G) == 90  # two lines each
    for gallery, ids in zip(galleries, case.galleries, strict=True):
        found = one_to_many(templates, gallery, probes, fpirs=(0.05, 0.3))
        rank, tpir, mated, alone = _searched(case, templates, ids)
        assert found.rank == rank
        assert [entry.tar for entry in found.tpir] == pytest.approx(tpir, rel=1e-12)
        assert (found.mated, found.non_mated) == (mated, alone) == (45, 45)
    both = one_to_many(templates, joined(galleries), probes)
    assert both.non_mated == 0
    assert all(math.isnan(entry.tar) and "there are none" in entry.reason for entry in both.tpir)
    assert 0 < both.rank[1] <= both.rank[5] <= both.rank[10] <= 1


def test_galleries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    case = made_up()
    paths = write(case, tmp_path)
    images = read_images(paths["media"])
    templates = pooled(EmbeddingFile(paths["x"]), images.template_N, images.media_N)
    gallery = read_persons(paths["g1"], templates.ids_T, paths["media"])
    probes = read_persons(paths["probes"], templates.ids_T, paths["media"])
    with pytest.raises(DataError, match=r"g1.txt: subject 0: expected one template, found \d+ and \d+"):
        one_to_many(templates, gallery._replace(subject_G=gallery.subject_G * 0), probes)
    with pytest.raises(DataError, match=r"g1.txt: template \d+ is a probe, and in .*g1.txt: it would find itself"):
        one_to_many(templates, gallery, gallery)
    with pytest.raises(DataError, match=r"expected some subject of .*g1.txt, found none"):
        one_to_many(templates, gallery, probes._replace(subject_G=probes.subject_G + 1000))
