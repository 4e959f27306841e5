"""Synthetic faces: pure functions of their numbers, alike for one person, different for two, as hard as they say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.contact_sheet import contact_sheet, write_png
from data.errors import DataError
from data.loading.decode import decode_image
from data.synthetic import SyntheticFaces, plan_samples

FACES = SyntheticFaces(identities=40, seed=11)


def _flat(faces: SyntheticFaces, identity: int, image: int) -> npt.NDArray[np.float64]:
    """The middle of the face, coarse, without brightness and contrast: what a very simple eye would compare."""
    middle = faces.pixels(identity, image)[28:100, 28:84].astype(float).reshape(18, 4, 14, 4, 3).mean((1, 3)).ravel()
    return (middle - middle.mean()) / np.linalg.norm(middle - middle.mean())


def test_an_image_is_a_function_of_its_numbers() -> None:
    again = SyntheticFaces(identities=40, seed=11)
    assert again.jpeg(7, 3) == FACES.jpeg(7, 3)
    FACES.jpeg(9, 1)
    assert again.jpeg(7, 3) == FACES.jpeg(7, 3), "whatever was drawn before"
    for other in (FACES.jpeg(7, 4), FACES.jpeg(8, 3), SyntheticFaces(identities=40, seed=12).jpeg(7, 3)):
        assert other != FACES.jpeg(7, 3)


def test_persons_are_numbered_across_sets() -> None:
    """Held-out persons follow those that are trained on: nobody is in both."""
    held_out = SyntheticFaces(identities=5, seed=11, first_identity=30)
    assert held_out.jpeg(2, 6) == FACES.jpeg(32, 6)
    assert held_out.difficulty(2) == FACES.difficulty(32)


def test_pixels_are_a_jpeg_of_the_right_size() -> None:
    for identity in range(12):
        pixels = FACES.pixels(identity, 0)
        assert (pixels.shape, pixels.dtype) == ((112, 112, 3), np.uint8)
        assert pixels.std() > 15, "something is drawn"
        decoded = decode_image(FACES.jpeg(identity, 0), (112, 112))
        assert np.abs(decoded.astype(int) - pixels).mean() < 12


def test_one_person_looks_more_alike_than_two() -> None:
    x = np.array([[_flat(FACES, identity, image) for image in range(4)] for identity in range(25)])
    cosines = np.einsum("iad,jbd->iajb", x, x)
    same = np.mean([cosines[i, a, i, b] for i in range(25) for a in range(4) for b in range(a)])
    other = np.mean([cosines[i, a, j, b] for i in range(25) for j in range(i) for a in range(4) for b in range(4)])
    assert same > other + 0.1


def test_traits_stay_and_circumstances_change() -> None:
    assert FACES.traits(3) is FACES.traits(3)
    yaws = {FACES.circumstances(3, image).yaw for image in range(8)}
    assert len(yaws) == 8


def test_difficult_persons_vary_more() -> None:
    easy = SyntheticFaces(identities=400, seed=2, difficulty_spread=1.0)
    order = sorted(range(400), key=easy.difficulty)
    assert easy.difficulty(order[0]) < 0.05
    assert easy.difficulty(order[-1]) > 0.95

    def distance(identity: int) -> float:
        first, second = _flat(easy, identity, 0), _flat(easy, identity, 1)
        return 1 - float(first @ second)

    assert np.mean([distance(i) for i in order[-25:]]) > 1.5 * np.mean([distance(i) for i in order[:25]])
    alike = SyntheticFaces(identities=9, seed=2, difficulty_spread=0.0)
    assert {alike.difficulty(identity) for identity in range(9)} == {0.5}


def test_every_style_and_accident_is_drawn() -> None:
    """All branches of the drawing: a thousand persons have every hair style and beard, and every thing happens."""
    faces = SyntheticFaces(identities=1000, seed=0, difficulty_spread=1.0)
    wanted = {"bald", "short", "receding", "parted", "fringe", "long", "bun"}
    wanted |= {"none", "stubble", "moustache", "goatee", "full", "clear", "dark", "mask", "hand", "edge"}
    for identity in range(1000):
        traits, happened = faces.traits(identity), faces.circumstances(identity, 0)
        found = {traits.hair_style, traits.beard, happened.glasses, happened.cover} & wanted
        if found:
            wanted -= found
            assert faces.pixels(identity, 0).std() > 5
    assert not wanted


@settings(max_examples=60, deadline=None)
@given(
    identities=st.integers(2, 60),
    images=st.integers(1, 30),
    long_tail=st.floats(0, 1),
    label_noise=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_plan_has_the_counts_and_the_noise_that_were_asked_for(
    identities: int, images: int, long_tail: float, label_noise: float, seed: int
) -> None:
    wanted = {"identities": identities, "images_per_identity": images, "long_tail": long_tail}
    plan = plan_samples(**wanted, label_noise=label_noise, seed=seed)  # type: ignore[arg-type]
    identity, image, label = plan.T
    counts = np.bincount(identity, minlength=identities)
    assert counts.max() == images
    assert counts.min() == max(1, round(images * 20**-long_tail))
    assert np.array_equal(image, np.concatenate([np.arange(count) for count in counts])), (
        "no image twice, none left out"
    )
    assert (identity != label).sum() == round(label_noise * len(plan))
    assert ((label >= 0) & (label < identities)).all()
    assert np.array_equal(plan, plan_samples(**wanted, label_noise=label_noise, seed=seed))  # type: ignore[arg-type]


def test_wrong_labels_are_spread_over_all_other_identities() -> None:
    plan = plan_samples(identities=5, images_per_identity=4000, long_tail=0.0, label_noise=1.0, seed=0)
    table = np.zeros((5, 5))
    np.add.at(table, (plan[:, 0], plan[:, 2]), 1)
    assert (np.diag(table) == 0).all()
    assert np.abs(table[~np.eye(5, dtype=bool)] / 1000 - 1).max() < 0.12


@pytest.mark.parametrize(
    "wrong",
    [{"identities": 0}, {"seed": -1}, {"first_identity": -1}, {"difficulty_spread": 1.1}],
)
def test_faces_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="synthetic faces: expected"):
        SyntheticFaces(**{"identities": 3, "seed": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="expected 0 to 39"):
        FACES.jpeg(40, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"identities": 1}, {"images_per_identity": 0}, {"long_tail": -0.1}, {"label_noise": 1.5}, {"seed": -1}],
)
def test_plan_out_of_range(wrong: dict[str, float]) -> None:
    fine = {"identities": 3, "images_per_identity": 2, "long_tail": 0.0, "label_noise": 0.0, "seed": 0}
    with pytest.raises(DataError, match="plan of synthetic faces: expected"):
        plan_samples(**{**fine, **wrong})  # type: ignore[arg-type]


# ---- contact sheets ----------------------------------------------------------------------------------------------


def test_contact_sheet_shows_every_image_where_it_belongs(tmp_path: object) -> None:
    rows = [[np.full((6, 9, 3), 10 * r + c, np.uint8) for c in range(4 - r)] for r in range(3)]
    sheet = contact_sheet(rows)
    assert sheet.shape == (4 + 3 * 10, 4 + 4 * 13, 3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = 4 + 10 * r, 4 + 13 * c
            assert np.array_equal(sheet[top : top + 6, left : left + 9], image)
    captioned = contact_sheet(rows, captions=["one", "two", "three"])
    assert captioned.shape == (4 + 3 * 26, sheet.shape[1], 3)
    assert (captioned[4:20] < 128).any(), "the caption is written"
    write_png(tmp_path / "sheet.png", captioned)  # type: ignore[operator]
    with (tmp_path / "sheet.png").open("rb") as file:  # type: ignore[operator]
        assert np.array_equal(decode_image(file.read(), captioned.shape[:2]), captioned)


@pytest.mark.parametrize("rows", [[], [[]], [[np.zeros((2, 2, 3), np.uint8)], [np.zeros((2, 3, 3), np.uint8)]]])
def test_contact_sheet_of_nothing_or_of_many_sizes(rows: list[list[npt.NDArray[np.uint8]]]) -> None:
    with pytest.raises(ValueError, match="expected images of one size"):
        contact_sheet(rows)
