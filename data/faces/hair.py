"""Hair, shoulders, glasses and what may hide a part of a synthetic face."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from data.faces.canvas import DARK, SHIFT_BITS, Canvas, Head, mirrored, shade, smooth


def draw_hair_back(canvas: Canvas, head: Head) -> None:
    """Shoulders, neck, and what of the hair lies behind the face."""
    t, c = head.traits, head.circumstances
    shoulders = mirrored(np.array([(0, 52.0), (22, 53.0), (48, 62.0), (60, 80.0), (0, 84.0)]))
    neck = mirrored(np.array([(0, 20.0), (17, 24.0), (16, 44.0), (22, 58.0), (0, 64.0)]))
    if t.hair_style in ("long", "bun"):
        wide = t.cheek_width + t.hair_volume
        if t.hair_style == "long":
            rear = np.array(
                [
                    (0, -45 - t.hair_volume),
                    (0.75 * wide, -40.0),
                    (wide + 2, -12.0),
                    (wide + 3, 26.0),
                    (wide - 3, 58.0),
                    (0, 60.0),
                ]
            )
        else:
            rear = np.array([(0, -58.0 - t.hair_volume), (11, -52.0), (12, -42.0), (0, -38.0)])
        canvas.fill(
            smooth(head.outline(mirrored(rear) + np.array([0.8 * c.tousle[0], 0]))), shade(t.hair, 0.72), lit=170
        )
    canvas.fill(smooth(head.outline(shoulders)), c.clothes, lit=90)
    canvas.fill(smooth(head.outline(neck)), shade(t.skin, 0.74), lit=200)


def draw_hair_front(canvas: Canvas, head: Head) -> None:
    """The hair over the forehead and temples."""
    t, c = head.traits, head.circumstances
    if t.hair_style == "bald":
        return
    volume, line = t.hair_volume * {"short": 0.6, "receding": 0.35}.get(t.hair_style, 1.0), t.hairline_y
    wide, sway = t.forehead_width + 0.75 * volume, 0.7 * c.tousle[0]
    top = np.array(
        [
            (-t.cheek_width + 1.2, -4.0),
            (-wide - 2.2, -20.0),
            (-0.72 * wide, -42 - 0.6 * volume),
            (sway, -45 - volume),
            (0.72 * wide, -42 - 0.6 * volume),
            (wide + 2.2, -20.0),
            (t.cheek_width - 1.2, -4.0),
        ]
    )
    edge, inner = t.forehead_width - 1, t.forehead_width - 3.5
    middle, half_right, half_left = (0.0, line - 1), 0.5 * inner, -0.5 * inner
    temple, side, between = line + 8, -13.0, line
    if t.hair_style == "receding":
        temple, between, half_right, half_left = line + 4, line - 8, 0.55 * inner, -0.55 * inner
    elif t.hair_style in ("parted", "long"):
        temple, side, between = line + 14, 2.0 if t.hair_style == "long" else -8.0, line + 4
        middle, half_right, half_left = (t.part_x, line - 6), 0.5 * (t.part_x + inner), 0.5 * (t.part_x - inner)
    elif t.hair_style == "fringe":
        temple, side, between, middle = -15.5, -8.0, -15 + c.tousle[1], (0.0, -16.5)
    right = [(edge, side), (inner, temple), (half_right, between)]
    left = [(half_left, between), (-inner, temple), (-edge, side)]
    rim = np.array([*right, middle, *left])
    lower = smooth(head.place(rim, 3), closed=False)
    upper = head.outline(top)
    upper[[0, -1]] = lower[[-1, 0]]  # the one turns with the face, the other is its silhouette: they meet at the ears
    upper = smooth(upper, closed=False)
    canvas.fill(np.concatenate([upper, lower]), t.hair, lit=235)
    count = len(lower)
    for strand in range(2, 23, 3):
        start, end = lower[strand * count // 25], upper[-1 - strand * len(upper) // 25]
        canvas.line(
            np.stack([start + 0.15 * (end - start), start + 0.8 * (end - start)]),
            shade(t.hair, 1.22 if strand % 2 else 0.8),
            1,
        )


def draw_glasses(canvas: Canvas, head: Head) -> None:
    """Clear or dark ones; their form belongs to the person."""
    t, c = head.traits, head.circumstances
    if not c.glasses:
        return
    frame = np.clip(t.iris[::-1] * 0.4 + 10, 0, 120)
    half, high = t.eye_width + 3.6, 5.2 + t.lid
    square = 0.62 + 0.36 * t.nose_tip
    lens = np.array(
        [
            (0, -high),
            (square * half, -square * high),
            (half, 0),
            (square * half, square * high),
            (0, high),
            (-square * half, square * high),
            (-half, 0),
            (-square * half, -square * high),
        ]
    )
    for side in (-1, 1):
        ring = smooth(head.place(lens + np.array([side * (t.eye_x + 0.3), t.eye_y + 1]), 5))
        canvas.blend(ring, DARK if c.glasses == "dark" else np.full(3, 225.0), 0.93 if c.glasses == "dark" else 0.1)
        canvas.line(np.concatenate([ring, ring[:1]]), frame, 2 + 2 * t.lid)
        arm = np.array([(side * (t.eye_x + half), t.eye_y), (side * t.cheek_width, t.eye_y - 1.5)])
        canvas.line(head.place(arm, 2), frame, 2)
    bridge = np.array([(-(t.eye_x - half), t.eye_y), (0, t.eye_y - 1.6), (t.eye_x - half, t.eye_y)])
    canvas.line(smooth(head.place(bridge, 6), closed=False), frame, 2)


def draw_cover(image: npt.NDArray[np.float32], head: Head) -> None:
    """A mask, a hand or something at the edge, in front of all, on the lit image."""
    t, c = head.traits, head.circumstances
    if not c.cover:
        return
    if c.cover == "mask":
        cloth = np.array(
            [
                (0, 6.0),
                (20, 8.0),
                (t.cheek_width - 1, 8.0),
                (t.jaw_width, 26.0),
                (t.chin_width, t.chin_y + 1),
                (0, t.chin_y + 3),
            ]
        )
        outline, colour = (
            smooth(head.outline(mirrored(cloth))),
            np.array([205.0, 218.0, 228.0]) * (0.6 + 0.4 * c.cover_at[0]),
        )
    elif c.cover == "hand":
        palm = np.array([(-8, -14.0), (7, -16.0), (12, 0.0), (10, 40.0), (-10, 40.0), (-12, 0.0)])
        at = np.array([-26 + 52 * c.cover_at[0], 14 + 20 * c.cover_at[1]])
        outline, colour = smooth(head.outline(palm + at)), shade(t.skin, 0.92)
    else:
        side = 1 if c.cover_at[0] > 0.5 else -1
        x = side * (14 + 16 * c.cover_at[1])
        edge = np.array(
            [(x, -90.0), (x + 5 * side, 0.0), (x - 2 * side, 90.0), (side * 120, 90.0), (side * 120, -90.0)]
        )
        outline, colour = head.outline(edge), c.background_3x3[0, 0] * 0.6
    cv2.fillPoly(image, [np.rint(outline * 8).astype(np.int32)], (colour * c.exposure).tolist(), cv2.LINE_8, SHIFT_BITS)
