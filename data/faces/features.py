"""Skin, eyes, nose, mouth, beard and marks of a synthetic face. Each part is drawn over those before it."""

from __future__ import annotations

import cv2
import numpy as np

from data.faces.canvas import DARK, SHIFT_BITS, Canvas, Head, Points, fixed_point, mirrored, paint, shade, smooth
from data.faces.traits import Traits


def _skull(t: Traits) -> Points:
    return mirrored(
        np.array(
            [
                (0, -44.0),
                (0.62 * t.forehead_width, -40.0),
                (t.forehead_width, -23.0),
                (t.cheek_width, 0.0),
                (t.jaw_width, 22.0),
                (t.chin_width, t.chin_y - 4.5),
                (0, t.chin_y),
            ]
        )
    )


def draw_shape(canvas: Canvas, head: Head) -> None:
    """Ears and the skin of the face."""
    t = head.traits
    for side in (-1, 1):
        ear = np.array([(0, -6.0), (3.2, -7.0), (4.6, -2.0), (3, 4.0), (0.5, 6.0), (-2, 0.0)]) * (
            side * t.ear_size / 7,
            t.ear_size / 7,
        )
        at = np.array([side * (t.cheek_width - 1.0), 1.0])
        lean = 7 * np.sin(head.circumstances.yaw)
        canvas.fill(smooth(head.outline(ear + at - (lean, 0))), shade(t.skin, 0.86), lit=255)
    canvas.fill(smooth(head.outline(_skull(t))), t.skin, lit=255)
    cheeks = np.array([(-5, -3.0), (4, -4.0), (6, 3.0), (-3, 5.0)])
    for side in (-1, 1):
        spot = smooth(head.place(cheeks * (side, 1) + (side * 0.62 * t.cheek_width, 13), 1))
        canvas.blend(spot, np.clip(t.skin * (1.02, 0.74, 0.72), 0, 255), 0.5 * t.blush, 5)
        hollow = cheeks * (side * 0.8, 1.6) + (side * (t.jaw_width - 2), 18)
        canvas.blend(smooth(head.place(hollow, 0)), shade(t.skin, 0.7), 0.35, 6)
    if t.folds > 0.25:
        for side in (-1, 1):
            fold = np.array(
                [
                    (t.nose_width + 1.2, head.nose_y),
                    (t.mouth_width + 1.5, t.mouth_y - 3),
                    (t.mouth_width + 2, t.mouth_y + 3),
                ]
            )
            canvas.line(smooth(head.place(fold * (side, 1), 1), closed=False), shade(t.skin, 0.92 - 0.2 * t.folds), 2)
        for line in range(int(4 * t.folds)):
            y = -18.0 - 3.6 * line
            crease = np.array([(-13, y + 0.8), (-5, y), (5, y), (13, y + 0.8)])
            canvas.line(smooth(head.place(crease, 0), closed=False), shade(t.skin, 0.96 - 0.12 * t.folds), 1)


def draw_nose(canvas: Canvas, head: Head) -> None:
    """Flanks, wings, nostrils and the highlight of the tip."""
    t = head.traits
    y, w = head.nose_y + 0.5 * t.asymmetry[3], t.nose_width
    for side in (-1, 1):
        flank = np.array(
            [
                (t.bridge_width, t.eye_y - 1),
                (t.bridge_width + 1.4, y - 9),
                (w + 0.4, y - 1),
                (0.6 * w, y - 3),
                (t.bridge_width - 1, y - 9),
            ]
        )
        canvas.blend(smooth(head.place(flank * (side, 1), 2)), shade(t.skin, 0.72), 0.42, 2)
        wing = np.array([(0.62 * w, y - 3.4), (w, y - 1.6), (0.98 * w, y + 1.4), (0.55 * w, y + 1.6)])
        canvas.blend(smooth(head.place(wing * (side, 1), 0.35 * t.nose_height)), shade(t.skin, 0.84), 0.9, 1)
        hole = np.array([(0.26 * w, y + 1.0), (0.55 * w, y + 0.2), (0.66 * w, y + 1.5), (0.34 * w, y + 2.1)])
        canvas.blend(smooth(head.place(hole * (side, 1), 0.6 * t.nose_height)), shade(t.skin, 0.3), 0.85)
    ball = (2.0 + 1.6 * t.nose_tip) * np.array([(-1, 0.0), (0, -1.1), (1, 0.0), (0, 0.8)]) + (0, y - 1.6)
    canvas.blend(smooth(head.place(ball, t.nose_height)), np.clip(t.skin * 1.1 + 12, 0, 255), 0.6, 2)
    below = np.array([(-0.5 * w, y + 2.2), (0, y + 3), (0.5 * w, y + 2.2), (0, y + 4.6)])
    canvas.blend(smooth(head.place(below, 0.3 * t.nose_height)), shade(t.skin, 0.62), 0.45, 2)


def draw_eyes(canvas: Canvas, head: Head) -> None:
    """Sockets, eyes, lids and brows."""
    t, c = head.traits, head.circumstances
    for side in (-1, 1):
        uneven = side * t.asymmetry
        centre = np.array([side * t.eye_x, t.eye_y + 0.5 * uneven[0]])
        w, h = t.eye_width, t.eye_height * c.eyes_open
        tilt = np.array([(0, 0.35 * t.eye_tilt), (0, 0), (0, 0), (0, -t.eye_tilt), (0, 0), (0, 0)])
        lens = np.array(
            [(-w, 0.5), (-0.45 * w, -0.8 * h), (0.35 * w, -h), (w, 0.0), (0.4 * w, 0.72 * h), (-0.4 * w, 0.66 * h)]
        )
        lens = (lens + tilt) * (side, 1) + centre
        socket = (lens - centre) * (1.3, 2.3) + centre - (0, 0.8)
        canvas.blend(smooth(head.place(socket, 0)), shade(t.skin, 0.74), 0.5, 3)
        pouch = np.array([(-0.7 * w, h + 1), (0, h + 2.2), (0.8 * w, h + 1), (0, h + 3.6)]) * (side, 1) + centre
        canvas.blend(smooth(head.place(pouch, 0)), shade(t.skin, 0.6), 0.5 * t.bags, 1)
        shape = smooth(head.place(lens, 0))
        canvas.fill(shape, np.array([236.0, 232.0, 228.0]) * 0.94)
        if c.eyes_open > 0.3:
            _draw_iris(canvas, head, shape, centre + np.array([side * 0.1, -0.12 * h]) + c.gaze)
        canvas.line(shape[:19], DARK, 2.4)
        canvas.line(shape[18:], shade(t.skin, 0.62), 1)
        crease = (lens[:4] - centre) * (1.06, 1.0) + centre - (0, 1.3 + 1.4 * t.lid)
        canvas.line(smooth(head.place(crease, 0), closed=False), shade(t.skin, 0.8 - 0.28 * t.lid), 1 + t.lid)
        _draw_brow(canvas, head, side, centre, 0.5 * uneven[1])


def _draw_iris(canvas: Canvas, head: Head, shape: Points, at: Points) -> None:
    """Iris, pupil and reflex, cut off by the lids."""
    t, zoom = head.traits, head.circumstances.zoom
    if not (area := canvas.area(shape, 1)):
        return
    origin, pixels = area
    eye = Canvas(pixels.copy())
    centre = head.place(at[None], 0)[0] - origin
    radius = 2 * zoom * t.iris_radius
    eye.disc(centre, radius, shade(t.iris, 0.55))
    eye.disc(centre, 0.82 * radius, t.iris)
    eye.disc(centre, 0.42 * radius, DARK)
    eye.disc(centre + 0.3 * radius * np.sign(head.circumstances.light[:2]), 0.2 * radius, np.full(3, 250.0))
    mask = np.zeros(pixels.shape[:2], np.uint8)
    cv2.fillPoly(mask, [fixed_point(shape - origin)], [255], cv2.LINE_AA, SHIFT_BITS)
    paint(pixels, eye.pixels, mask)


def _draw_brow(canvas: Canvas, head: Head, side: int, centre: Points, uneven: float) -> None:
    t = head.traits
    w, thick = t.brow_width, t.brow_thickness
    middle = centre[1] - t.brow_gap + uneven - 1.3 * head.circumstances.raise_brows
    upper = np.array([(-w, 0.3), (-0.3 * w, -0.7 * t.brow_arch), (0.4 * w, -t.brow_arch), (1.05 * w, 0.6)])
    upper[:, 1] += t.brow_tilt * upper[:, 0] / -w
    lower = upper[::-1] + np.array([(0, 0.25), (0, 0.9), (0, 1), (0.4, 0.85)]) * (1, thick)
    brow = np.concatenate([upper, lower]) * (side, 1) + (centre[0] + side * 0.6, middle)
    canvas.blend(smooth(head.place(brow, 1)), t.brow, 0.92, 1)


def draw_mouth_and_beard(canvas: Canvas, head: Head) -> None:
    """Beard below, then lips, teeth and the dark between them."""
    t, c = head.traits, head.circumstances
    gap = c.open_mouth
    w = t.mouth_width * (1 + 0.12 * c.smile)
    y, corner = t.mouth_y, t.mouth_y - 1.6 * c.smile - t.mouth_curve
    _draw_beard(canvas, head, w, gap)
    u, low, uneven = t.upper_lip * (1 - 0.12 * c.smile), t.lower_lip, 0.5 * t.asymmetry[2]
    upper = np.array(
        [
            (-w, corner + uneven),
            (-0.38 * w, y - u - 0.4),
            (0, y - u + t.cupid),
            (0.38 * w, y - u - 0.4),
            (w, corner - uneven),
        ]
    )
    inner_up = np.array(
        [(w, corner - uneven), (0.45 * w, y + 0.1), (0, y + 0.4), (-0.45 * w, y + 0.1), (-w, corner + uneven)]
    )
    inner_low = inner_up[::-1] + np.array([(0, 0), (0, gap), (0, 1.1 * gap), (0, gap), (0, 0)])
    lower = np.array(
        [
            (w, corner - uneven),
            (0.5 * w, y + 0.86 * low + gap),
            (0, y + low + gap + 0.3),
            (-0.5 * w, y + 0.86 * low + gap),
            (-w, corner + uneven),
        ]
    )
    out = 1.5

    def curve(points: Points) -> Points:
        return smooth(head.place(points, out), closed=False)

    canvas.blend(np.concatenate([curve(inner_low), curve(lower)]), t.lips, 0.95, 1)
    canvas.blend(np.concatenate([curve(upper), curve(inner_up)]), shade(t.lips, 0.86), 0.95, 1)
    shine = np.array(
        [
            (-0.35 * w, y + 0.5 * low + gap),
            (0, y + 0.4 * low + gap),
            (0.35 * w, y + 0.5 * low + gap),
            (0, y + 0.75 * low + gap),
        ]
    )
    canvas.blend(smooth(head.place(shine, out)), np.clip(t.lips * 1.15 + 14, 0, 255), 0.5, 1)
    if gap > 0.5:
        canvas.fill(np.concatenate([curve(inner_up), curve(inner_low)]), DARK * 1.6)
        teeth = inner_up * (0.8, 1) + (0, 0.2)
        bottom = teeth[::-1] + np.array([(0, 0.2), (0, 0.6 * gap), (0, 0.7 * gap), (0, 0.6 * gap), (0, 0.2)])
        canvas.fill(np.concatenate([curve(teeth), curve(bottom)]), np.array([232.0, 226.0, 214.0]))
    canvas.line(curve(inner_up), shade(t.lips, 0.42), 1.6)
    chin = np.array(
        [(-5, y + low + gap + 3.4), (0, y + low + gap + 2.4), (5, y + low + gap + 3.4), (0, y + low + gap + 4.6)]
    )
    canvas.blend(smooth(head.place(chin, 0)), shade(t.skin, 0.66), 0.4, 2)


def _draw_beard(canvas: Canvas, head: Head, mouth_width: float, gap: float) -> None:
    t = head.traits
    if t.beard == "none":
        return
    y = t.mouth_y
    opacity = 0.32 if t.beard == "stubble" else 0.86
    moustache = np.array(
        [
            (0, y - t.upper_lip - 3.6),
            (0.7 * mouth_width, y - t.upper_lip - 2.2),
            (1.15 * mouth_width, y + 1.5),
            (0.6 * mouth_width, y - t.upper_lip),
            (0, y - t.upper_lip - 0.2),
        ]
    )
    canvas.blend(smooth(head.place(mirrored(moustache), 1)), shade(t.brow, 0.95), opacity, 2)  # of every beard
    if t.beard == "goatee":
        tuft = np.array(
            [(0, y + t.lower_lip + gap + 1.4), (7, y + t.lower_lip + gap + 2), (7.5, t.chin_y - 3), (0, t.chin_y + 1)]
        )
        canvas.blend(smooth(head.place(mirrored(tuft), 0)), shade(t.brow, 0.95), opacity, 2)
    if t.beard in ("full", "stubble"):
        jaw = np.array(
            [
                (0, y + t.lower_lip + gap + 1.6),
                (0.8 * mouth_width, y + 4.5 + gap),
                (1.25 * mouth_width, y - 2),
                (t.jaw_width - 5, y - 7),
                (t.cheek_width - 2.5, 4.0),
                (t.jaw_width + 0.8, 21.0),
                (t.chin_width + 3, t.chin_y - 2),
                (0, t.chin_y + 2),
            ]
        )
        canvas.blend(smooth(head.outline(mirrored(jaw))), shade(t.brow, 0.95), opacity, 3)


def draw_marks(canvas: Canvas, head: Head) -> None:
    """Moles and freckles."""
    t = head.traits
    for x, y, radius in t.marks_M3:
        at = head.place(np.array([[x, y]]), 0)[0]
        canvas.disc(at, 2 * radius, shade(t.skin, 0.45 if radius >= 0.7 else 0.72))
