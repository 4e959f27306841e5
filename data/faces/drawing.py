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
    image *= light[..., None] * (c.exposure * c.cast).astype(np.float32)
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
    centre = head.centre
    scale = c.zoom
    nx = (x - centre[0]) / np.float32(scale * 1.22 * t.cheek_width)
    ny = (y - centre[1]) / np.float32(scale * 55)
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.06))
    # The nose: a ridge from the bridge to the tip and a ball at its end, as slopes of a height above the ellipsoid.
    top, tip = head.place(np.array([[0, t.eye_y + 2]]), 0)[0] / 2, head.nose_tip / 2
    along = np.clip((y - top[1]) / max(tip[1] - top[1], 1), 0, 1.25)
    ridge_x = top[0] + along * (tip[0] - top[0])
    width = np.float32(scale) * (0.62 * t.bridge_width + 0.42 * t.nose_width * along)
    off = (x - ridge_x) / width
    fade = np.exp(-(np.maximum(y - tip[1], 0) ** 2) / 9) * (y > top[1] - 3)
    height = np.float32(0.085 * t.nose_height) * along * np.exp(-off * off) * fade
    nx = nx + height * off * 1.9
    ny = ny + 1.1 * height * (y > tip[1] - 1)
    # Below the brows and beside the mouth the face lies back.
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    lambert = (nx * c.light[0] + ny * c.light[1] + nz * c.light[2]) / length
    light = np.float32(c.ambient) + np.float32(1 - c.ambient) * 1.28 * np.maximum(lambert, 0)
    return np.asarray(light, np.float32)
