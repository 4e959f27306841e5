"""Draws a face from traits and circumstances: polygons on a sphere-like head, turned, lit, blurred; 112x112 RGB.

Shapes are drawn with anti-aliasing at twice the size, shrunk, and lit pixel by pixel with the normals of an ellipsoid
with a nose on it. Colours and places follow the traits; nothing is read from disk.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from data.faces.canvas import Canvas, Head
from data.faces.features import draw_eyes, draw_marks, draw_mouth_and_beard, draw_nose, draw_shape
from data.faces.hair import draw_cover, draw_glasses, draw_hair_back, draw_hair_front
from data.faces.traits import Circumstances, Traits

SIZE = 112
"""Height and width of an image."""

Pixels = npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def _grid() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return x + 0.5, y + 0.5


def draw_face(traits: Traits, circumstances: Circumstances, rng: np.random.Generator) -> Pixels:
    """RGB uint8 (112, 112, 3). rng: of the sensor's noise."""
    c = circumstances
    head = Head(traits, c)
    background = cv2.resize(c.background_3x3.astype(np.float32), (2 * SIZE, 2 * SIZE), interpolation=cv2.INTER_CUBIC)
    canvas = Canvas(np.clip(background, 0, 255).astype(np.uint8))
    draw_hair_back(canvas, head)
    draw_shape(canvas, head)
    draw_mouth_and_beard(canvas, head)
    draw_nose(canvas, head)
    draw_eyes(canvas, head)
    draw_marks(canvas, head)
    draw_hair_front(canvas, head)
    draw_glasses(canvas, head)
    image = cv2.resize(canvas.pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    lit = cv2.resize(canvas.lit, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    light = 1 + lit * (_light(head) - 1)
    image *= cv2.merge([light * gain for gain in (c.exposure * c.cast).tolist()])
    draw_cover(image, head)
    if c.blur > 0.2:
        cv2.GaussianBlur(image, (0, 0), c.blur, dst=image)
    if c.motion:
        length = int(np.ceil(c.motion)) | 1
        cv2.blur(image, (length, 1), dst=image)
    image += rng.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(c.noise)
    return np.asarray(np.clip(image + 0.5, 0, 255), np.uint8)


def _light(head: Head) -> npt.NDArray[np.float32]:
    """Brightness of each pixel of a head under the light of the circumstances, float32 (112, 112), about 1 in front."""
    c, t = head.circumstances, head.traits
    x, y = _grid()
    # Python's own floats, as NumPy's would make everything float64.
    centre_x, centre_y = head.centre.tolist()
    top_x, top_y = (head.place(np.array([[0, t.eye_y + 2]]), 0)[0] / 2).tolist()
    tip_x, tip_y = (head.nose_tip / 2).tolist()
    light_x, light_y, light_z = c.light.tolist()
    nx = (x - centre_x) / (c.zoom * 1.22 * t.cheek_width)
    ny = (y - centre_y) / (c.zoom * 55)
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.06))
    # The nose: a ridge from the bridge to the tip and a ball at its end, as slopes of a height above the ellipsoid.
    rows, columns = _box(top_y - 3, tip_y + 12, top_x, tip_x, 3 * c.zoom * t.nose_width)
    x, y = x[rows, columns], y[rows, columns]
    along = np.clip((y - top_y) / max(tip_y - top_y, 1), 0, 1.25)
    off = (x - top_x - along * (tip_x - top_x)) / (c.zoom * (0.62 * t.bridge_width + 0.42 * t.nose_width * along))
    fade = np.exp(np.maximum(y - tip_y, 0) ** 2 / -9)
    height = 0.085 * t.nose_height * along * fade * np.exp(-off * off)
    nx[rows, columns] += 1.9 * height * off
    ny[rows, columns] += 1.1 * height * (y > tip_y - 1)
    lambert = (nx * light_x + ny * light_y + nz * light_z) / np.sqrt(nx * nx + ny * ny + nz * nz)
    return np.asarray(c.ambient + (1 - c.ambient) * 1.28 * np.maximum(lambert, 0), np.float32)


def _box(top: float, bottom: float, x1: float, x2: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns of the pixels from top to bottom, and from x1 to x2 with `reach` on either side."""
    left, right = min(x1, x2) - reach, max(x1, x2) + reach
    rows, columns = ((max(0, int(low)), max(1, int(high))) for low, high in ((top, bottom), (left, right)))
    return slice(*rows), slice(*columns)
