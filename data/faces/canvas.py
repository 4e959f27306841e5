"""What a synthetic face is drawn with: smooth outlines, a canvas of twice the image's size, and a head that turns."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from data.faces.traits import Circumstances, Colour, Traits

Points = npt.NDArray[np.float64]

DARK = np.array([26.0, 16.0, 16.0])
"""Pupils, lashes and what lies behind the teeth."""

_MIDDLE = np.array([56.0, 60.0])
"""Where the middle of a face that looks straight ahead comes to lie."""
_DEPTH, _WIDE, _HIGH = 38.0, 44.0**2, 58.0**2
"""Half axes of the ellipsoid that the face lies on; the two in the image squared."""
SHIFT_BITS = 4
"""Fractional bits of the coordinates that OpenCV takes."""


def fixed_point(points: Points) -> npt.NDArray[np.int32]:
    return np.rint(points * (1 << SHIFT_BITS)).astype(np.int32)


@lru_cache(maxsize=32)
def _curve(points: int, closed: bool) -> npt.NDArray[np.float64]:
    """Matrix (samples, points) of a Catmull-Rom curve through the points."""
    spans = points if closed else points - 1
    u = np.linspace(0, 1, 6, endpoint=False)
    weights = np.stack(
        [
            -0.5 * u + u**2 - 0.5 * u**3,
            1 - 2.5 * u**2 + 1.5 * u**3,
            0.5 * u + 2 * u**2 - 1.5 * u**3,
            -0.5 * u**2 + 0.5 * u**3,
        ]
    )
    matrix = np.zeros((spans * 6 + (not closed), points))
    for span in range(spans):
        for near in range(4):
            at = span + near - 1
            at = at % points if closed else min(max(at, 0), points - 1)
            matrix[span * 6 : span * 6 + 6, at] += weights[near]
    if not closed:
        matrix[-1, -1] = 1
    return matrix


def smooth(points: Points, *, closed: bool = True) -> Points:
    """A smooth curve through the points (n, 2)."""
    return _curve(len(points), closed) @ points


def mirrored(right: Points) -> Points:
    """A closed outline from its right half, top to bottom, whose first and last points lie on the axis."""
    return np.concatenate([right, right[-2:0:-1] * (-1, 1)])


def shade(colour: Colour, by: float) -> Colour:
    return np.clip(colour * by, 0, 255)


class Canvas:
    """pixels: RGB uint8; lit: how much of the light of the head falls on each pixel, uint8."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.pixels = pixels
        self.lit = np.zeros(pixels.shape[:2], np.uint8)

    def fill(self, outline: Points, colour: Colour, *, lit: int | None = None) -> None:
        """Fill a polygon in canvas coordinates."""
        fixed = [fixed_point(outline)]
        cv2.fillPoly(self.pixels, fixed, colour.tolist(), cv2.LINE_AA, SHIFT_BITS)
        if lit is not None:
            cv2.fillPoly(self.lit, fixed, [lit], cv2.LINE_8, SHIFT_BITS)

    def blend(self, outline: Points, colour: Colour, opacity: float, soft: int = 0) -> None:
        """Fill a polygon with a share of the colour, its edge softened over that many canvas pixels to each side."""
        if area := self.area(outline, 2 * soft + 1):
            origin, part = area
            mask = np.zeros(part.shape[:2], np.uint8)
            cv2.fillPoly(mask, [fixed_point(outline - origin)], [round(255 * opacity)], cv2.LINE_AA, SHIFT_BITS)
            if soft:  # twice a box is nearly a bell, at a tenth of its cost
                size = (2 * soft + 1, 2 * soft + 1)
                cv2.blur(mask, size, dst=mask)
                cv2.blur(mask, size, dst=mask)
            paint(part, colour, mask)

    def area(self, outline: Points, margin: int) -> tuple[Points, npt.NDArray[np.uint8]] | None:
        """First corner, and the pixels of a box round the outline; None when it lies outside."""
        low = np.maximum(outline.min(0).astype(int) - margin, 0)
        high = np.minimum(outline.max(0).astype(int) + margin + 2, self.pixels.shape[1::-1])
        if (high <= low).any():
            return None
        return low.astype(float), self.pixels[low[1] : high[1], low[0] : high[0]]

    def line(self, points: Points, colour: Colour, width: float) -> None:
        fixed = [fixed_point(points)]
        cv2.polylines(self.pixels, fixed, False, colour.tolist(), max(1, round(width)), cv2.LINE_AA, SHIFT_BITS)

    def disc(self, centre: Points, radius: float, colour: Colour) -> None:
        x, y = fixed_point(centre).tolist()
        size = max(1, round(radius * (1 << SHIFT_BITS)))
        cv2.circle(self.pixels, (x, y), size, colour.tolist(), -1, cv2.LINE_AA, SHIFT_BITS)


def paint(pixels: npt.NDArray[np.uint8], over: npt.NDArray[Any], mask: npt.NDArray[np.uint8]) -> None:
    """Mix `over`, broadcast to (H, W, 3), into the pixels by the mask, 0 … 255, in place."""
    mixed = over.astype(np.float32) - pixels
    mixed *= np.multiply(mask, np.float32(1 / 255), dtype=np.float32)[..., None]
    mixed += pixels
    mixed += np.float32(0.5)
    pixels[:] = mixed


class Head:
    """Where the parts of a turned head lie. Alignment moves the eyes, nose and mouth back to the middle.

    centre: of the head, in image coordinates. nose_y: of the tip, on the face; nose_tip: where that is on the canvas.
    """

    def __init__(self, traits: Traits, circumstances: Circumstances) -> None:
        self.traits, self.circumstances = t, c = traits, circumstances
        cos, sin = np.cos, np.sin
        yaw = np.array([[cos(c.yaw), 0, sin(c.yaw)], [0, 1, 0], [-sin(c.yaw), 0, cos(c.yaw)]])
        pitch = np.array([[1, 0, 0], [0, cos(c.pitch), sin(c.pitch)], [0, -sin(c.pitch), cos(c.pitch)]])
        roll = np.array([[cos(c.roll), -sin(c.roll), 0], [sin(c.roll), cos(c.roll), 0], [0, 0, 1]])
        self._turn: list[list[float]] = (c.zoom * (roll @ pitch @ yaw))[:2].tolist()
        self._roll = c.zoom * np.ascontiguousarray(roll[:2, :2].T)
        five = np.array([[-14.6, -5], [14.6, -5], [0, 13], [-11, 25.5], [11, 25.5]])
        self.centre = _MIDDLE + c.shift
        self.centre = self.centre + five.mean(0) - (self.place(five, 0) / 2 - self.centre).mean(0)
        self.nose_y = t.eye_y + t.nose_length
        self.nose_tip = self.place(np.array([[0.0, self.nose_y]]), t.nose_height)[0]

    def place(self, points: Points, out: float) -> Points:
        """Canvas coordinates of points (n, 2) on the face, `out` pixels above the ellipsoid."""
        x, y = points[:, 0], points[:, 1]
        depth = _DEPTH * np.sqrt(np.maximum(1 - x * x / _WIDE - y * y / _HIGH, 0)) + out
        (xx, xy, xz), (yx, yy, yz) = self._turn
        placed = np.empty_like(points)
        placed[:, 0] = xx * x + xy * y + xz * depth  # spelt out: a call of BLAS costs more than these few numbers
        placed[:, 1] = yx * x + yy * y + yz * depth
        placed += self.centre
        placed *= 2
        return placed

    def outline(self, points: Points) -> Points:
        """Canvas coordinates of points (n, 2) of the silhouette, which turning hardly changes."""
        return np.asarray(2 * (points @ self._roll + self.centre))
