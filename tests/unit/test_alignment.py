"""Similarity transforms are those of a linear system solved by itself, and those that were planted."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from evaluation.alignment import REFERENCE_52, aligned, similarity
from tests.ijb_cases import Array


def _solved(points: Array, onto: Array) -> Array:
    """[[a, -b, x], [b, a, y]] by least squares: the same sum of squares, without a singular value decomposition."""
    rows = [row for px, py in points for row in ([px, -py, 1, 0], [py, px, 0, 1])]
    a, b, x, y = np.linalg.lstsq(np.array(rows), onto.ravel(), rcond=None)[0]
    return np.array([[a, -b, x], [b, a, y]])


def _planted(angle: float, scale: float, shift: tuple[float, float]) -> Array:
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def _moved(points: Array, transform: Array) -> Array:
    return points @ transform[:, :2].T + transform[:, 2]


@pytest.mark.parametrize("angle", [0, 0.3, -1.2, math.pi, 3])
@pytest.mark.parametrize("scale", [1e-3, 0.4, 1, 25])
def test_planted_transforms_are_found(angle: float, scale: float) -> None:
    planted = _planted(angle, scale, (13, -250))
    found = similarity(REFERENCE_52, _moved(REFERENCE_52, planted))
    np.testing.assert_allclose(found, planted, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_noisy_points_are_met_as_well_as_can_be(seed: int, count: int) -> None:
    g = np.random.default_rng(seed)
    points = 100 * g.standard_normal((count, 2))
    onto = _moved(points, _planted(g.uniform(-3, 3), g.uniform(0.1, 3), (5, 6))) + 5 * g.standard_normal((count, 2))
    np.testing.assert_allclose(similarity(points, onto), _solved(points, onto), rtol=1e-9, atol=1e-9)


def test_points_on_a_line_have_a_transform() -> None:
    points = np.array([[0.0, 0], [1, 1], [2, 2], [5, 5]])
    planted = _planted(0.7, 2, (1, 2))
    np.testing.assert_allclose(similarity(points, _moved(points, planted)), planted, atol=1e-12)


def test_a_mirror_image_is_not_mirrored() -> None:
    onto = REFERENCE_52 * (-1, 1)
    found = similarity(REFERENCE_52, onto)
    assert np.linalg.det(found[:, :2]) > 0
    np.testing.assert_allclose(found, _solved(REFERENCE_52, onto), atol=1e-9)


def test_a_face_is_brought_into_place() -> None:
    """Five coloured discs, turned, scaled and shifted, come to lie on the reference points."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    points = _moved(REFERENCE_52, _planted(0.5, 3, (90, 40)))
    image = np.zeros((500, 600, 3), np.uint8)
    for (x, y), colour in zip(points, colours, strict=True):
        cv2.circle(image, (round(x), round(y)), 12, colour, -1)
    face = aligned(image, points)
    assert face.shape == (112, 112, 3)
    assert face.dtype == np.uint8
    for (x, y), colour in zip(REFERENCE_52, colours, strict=True):
        assert face[round(y), round(x)].tolist() == list(colour)
    for channels in zip(*(np.nonzero((face == colour).all(axis=2)) for colour in colours), strict=True):
        assert len(channels) == len(colours)
    for (x, y), colour in zip(REFERENCE_52, colours, strict=True):
        rows, columns = np.nonzero((face == colour).all(axis=2))
        assert (columns.mean(), rows.mean()) == pytest.approx((x, y), abs=0.3)


def test_a_face_in_place_stays_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    np.testing.assert_array_equal(aligned(image, REFERENCE_52), image)
    np.testing.assert_array_equal(aligned(image[:, ::-1], REFERENCE_52), image[:, ::-1])


def test_beyond_the_border_it_is_black() -> None:
    face = aligned(np.full((50, 50, 3), 200, np.uint8), REFERENCE_52)
    assert (face[:48, :48] == 200).all()
    assert not face[51:, 51:].any()


@pytest.mark.parametrize(
    ("points", "onto", "match"),
    [
        (np.ones((5, 2)), REFERENCE_52, "at different places"),
        (np.full((5, 2), math.nan), REFERENCE_52, "finite points"),
        (REFERENCE_52[:4], REFERENCE_52, r"one shape \(K, 2\), K >= 2, got \(4, 2\) and \(5, 2\)"),
        (REFERENCE_52[:1], REFERENCE_52[:1], "K >= 2"),
        (REFERENCE_52.ravel(), REFERENCE_52.ravel(), "K >= 2"),
    ],
)
def test_points_without_a_transform_are_refused(points: Array, onto: Array, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        similarity(points, onto)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32), np.zeros((0, 9, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(image: Array) -> None:
    with pytest.raises(ValueError, match=r"expected an image uint8 \(H, W, 3\)"):
        aligned(image, REFERENCE_52)
