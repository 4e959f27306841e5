"""What makes a synthetic face: the traits of a person, which stay, and the circumstances of an image, which change.

Lengths are in pixels of a 112x112 image, angles in radians, colours RGB 0 … 255. All of it is our own choice, made so
that a person is recognised by somebody who looks at a contact sheet, and strangers are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Colour = npt.NDArray[np.float64]
"""float64 (3,)."""

_SKIN = np.array(
    [(252, 224, 200), (240, 200, 168), (222, 172, 132), (186, 132, 94), (138, 92, 64), (96, 62, 44), (66, 43, 32)],
    float,
)
"""From the lightest to the darkest."""
_HAIR = np.array(
    [(24, 20, 19), (52, 36, 28), (88, 58, 38), (124, 66, 36), (172, 126, 72), (216, 184, 124), (150, 146, 142)], float
)
_HAIR_SHARE = (0.27, 0.23, 0.17, 0.07, 0.11, 0.08, 0.07)
_IRIS = np.array([(58, 36, 24), (98, 62, 34), (118, 104, 52), (84, 120, 82), (80, 124, 168), (118, 130, 138)], float)
_IRIS_SHARE = (0.32, 0.24, 0.12, 0.1, 0.15, 0.07)

HAIR_STYLES = ("bald", "short", "receding", "parted", "fringe", "long", "bun")
_HAIR_STYLE_SHARE = (0.08, 0.24, 0.1, 0.16, 0.14, 0.18, 0.1)
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
_BEARD_SHARE = (0.6, 0.12, 0.09, 0.08, 0.11)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """A person. Coordinates have their origin in the middle of the head, x to the right, y downwards."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    brow: Colour
    hair_style: str
    beard: str
    glasses: bool
    """Wears them in nearly every image."""

    forehead_width: float
    """Half widths at the temples, cheekbones, jaw and chin."""
    cheek_width: float
    jaw_width: float
    chin_width: float
    chin_y: float
    hairline_y: float
    hair_volume: float
    part_x: float
    ear_size: float

    eye_x: float
    """Half the distance of the eyes."""
    eye_y: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    """Rise of the outer corner."""
    iris_radius: float
    lid: float
    """0 … 1, weight of the crease above the eye."""
    bags: float
    """0 … 1, shadow below the eye."""

    brow_gap: float
    """Above the eye."""
    brow_width: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float

    nose_length: float
    nose_width: float
    bridge_width: float
    nose_height: float
    """How far the tip stands out."""
    nose_tip: float
    """0 … 1, how round the tip is."""

    mouth_y: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    cupid: float
    """Depth of the bow of the upper lip."""
    mouth_curve: float

    folds: float
    """0 … 1, lines from nose to mouth and on the forehead: age."""
    blush: float
    marks_M3: npt.NDArray[np.float64]
    """Moles and freckles: x, y, radius."""
    asymmetry: npt.NDArray[np.float64]
    """(4,): left minus right of eye height, brow, mouth corner, nose."""
    difficulty: float
    """0 … 1: how strongly circumstances vary between this person's images."""


def draw_traits(rng: np.random.Generator, *, spread: float) -> Traits:
    """A person. spread: 0 gives everyone the same difficulty, 1 any from 0 to 1."""
    n = rng.standard_normal

    def about(mean: float, deviation: float) -> float:
        return float(mean + deviation * np.clip(n(), -2.2, 2.2))

    tone = rng.uniform(0, len(_SKIN) - 1)
    low = int(tone)
    skin = _SKIN[low] + (tone - low) * (_SKIN[min(low + 1, len(_SKIN) - 1)] - _SKIN[low])
    skin = np.clip(skin * (1 + 0.05 * np.clip(n(3), -2, 2)), 20, 255)
    hair = _HAIR[rng.choice(len(_HAIR), p=_HAIR_SHARE)] * rng.uniform(0.75, 1.25)
    mouth_y = about(25.5, 1.5)
    marks = int(rng.choice([0, 1, 2, 3, 14, 22], p=[0.38, 0.22, 0.14, 0.1, 0.1, 0.06]))
    radius = rng.uniform(0.7, 1.5, marks) if marks <= 3 else rng.uniform(0.4, 0.7, marks)
    marks_M3 = np.stack([rng.uniform(-24, 24, marks), rng.uniform(-2 if marks > 3 else -28, 34, marks), radius], axis=1)
    return Traits(
        skin=skin,
        hair=np.clip(hair, 8, 245),
        iris=_IRIS[rng.choice(len(_IRIS), p=_IRIS_SHARE)] * rng.uniform(0.8, 1.2),
        lips=np.clip(skin * (0.86, 0.62, 0.62) * rng.uniform(0.86, 1.08) + (rng.uniform(0, 26), 0, 4), 0, 255),
        brow=np.clip(hair * rng.uniform(0.55, 0.95), 8, 220),
        hair_style=str(rng.choice(HAIR_STYLES, p=_HAIR_STYLE_SHARE)),
        beard=str(rng.choice(BEARDS, p=_BEARD_SHARE)),
        glasses=bool(rng.random() < 0.16),
        forehead_width=about(29, 1.8),
        cheek_width=about(32, 2.2),
        jaw_width=about(25.5, 2.8),
        chin_width=about(11, 2.4),
        chin_y=about(43, 2.4),
        hairline_y=about(-31, 3),
        hair_volume=about(5.5, 2),
        part_x=about(0, 9),
        ear_size=about(7, 1.4),
        eye_x=about(14.6, 1.3),
        eye_y=about(-5, 1.4),
        eye_width=about(6.6, 0.7),
        eye_height=about(3.0, 0.6),
        eye_tilt=about(0.6, 0.9),
        iris_radius=about(2.75, 0.25),
        lid=float(rng.uniform(0, 1)),
        bags=float(rng.beta(1, 2.5)),
        brow_gap=about(7.4, 1.3),
        brow_width=about(8.6, 1),
        brow_thickness=about(2.1, 0.75),
        brow_arch=about(1.7, 1.1),
        brow_tilt=about(0, 1.3),
        nose_length=about(18, 2.1),
        nose_width=about(6.6, 1.2),
        bridge_width=about(3.0, 0.6),
        nose_height=about(9, 1.9),
        nose_tip=float(rng.uniform(0, 1)),
        mouth_y=mouth_y,
        mouth_width=about(11.2, 1.5),
        upper_lip=about(2.3, 0.75),
        lower_lip=about(3.1, 0.85),
        cupid=about(0.9, 0.45),
        mouth_curve=about(0.2, 0.8),
        folds=float(rng.beta(1, 1.8)),
        blush=float(rng.beta(1, 2)),
        marks_M3=marks_M3,
        asymmetry=0.45 * np.clip(n(4), -2, 2),
        difficulty=float(0.5 + spread * (rng.random() - 0.5)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """One image of a person."""

    yaw: float
    pitch: float
    roll: float
    zoom: float
    shift: npt.NDArray[np.float64]
    """(2,): what alignment left over."""
    light: npt.NDArray[np.float64]
    """Unit vector (3,) to the light, z towards the viewer."""
    ambient: float
    """0 … 1, share of the light that comes from everywhere."""
    exposure: float
    cast: npt.NDArray[np.float64]
    """(3,): colour of the light."""
    smile: float
    """-1 … 1."""
    open_mouth: float
    """Opening in pixels."""
    raise_brows: float
    eyes_open: float
    """0 closed … 1."""
    gaze: npt.NDArray[np.float64]
    """(2,)."""
    glasses: str
    """"" , "clear" or "dark"."""
    cover: str
    """What hides a part of the face: "" , "mask", "hand", "edge"."""
    cover_at: npt.NDArray[np.float64]
    """(2,): 0 … 1."""
    clothes: Colour
    background_3x3: npt.NDArray[np.float64]
    """Colours (3, 3, 3), blended over the image."""
    tousle: npt.NDArray[np.float64]
    """(2,): how the hair lies today."""
    blur: float
    """Standard deviation in pixels."""
    motion: float
    """Length of a horizontal smear in pixels."""
    noise: float
    """Standard deviation in grey levels."""
    quality: int
    """Of the JPEG."""


def draw_circumstances(rng: np.random.Generator, traits: Traits) -> Circumstances:
    """How one image of a person came about; the person's difficulty scales everything that hinders."""
    n = rng.standard_normal
    strength = 0.35 + 1.3 * traits.difficulty

    def about(deviation: float, limit: float) -> float:
        return float(np.clip(strength * deviation * n(), -limit, limit))

    def happens(share: float) -> bool:
        return bool(rng.random() < share * strength)

    light = np.array([0.55 * n(), -0.45 + 0.35 * n(), 1.0])
    wears = rng.random() < 0.9 if traits.glasses else happens(0.04)
    glasses = "dark" if happens(0.035) else "clear" if wears else ""
    cover = str(rng.choice(["mask", "hand", "edge"])) if happens(0.07) else ""
    return Circumstances(
        yaw=about(0.2, 0.55),
        pitch=about(0.12, 0.32),
        roll=about(0.05, 0.16),
        zoom=1 + about(0.055, 0.15),
        shift=np.array([about(2.2, 5), about(2.2, 5)]),
        light=light / np.linalg.norm(light),
        ambient=float(np.clip(0.66 - 0.16 * strength * abs(n()), 0.25, 0.8)),
        exposure=float(np.clip(1 + 0.28 * strength * n(), 0.4, 1.6)),
        cast=1 + 0.08 * strength * np.clip(n(3), -2, 2),
        smile=float(np.clip(0.2 + 0.5 * n(), -0.8, 1.3)),
        open_mouth=float(max(0.0, 2.2 * n() - 0.6)),
        raise_brows=float(np.clip(0.6 * n(), -1.2, 1.8)),
        eyes_open=0.12 if happens(0.03) else float(np.clip(1 + 0.12 * n(), 0.6, 1.25)),
        gaze=0.5 * np.clip(n(2), -2, 2) * (1, 0.4),
        glasses=glasses,
        cover=cover,
        cover_at=rng.random(2),
        clothes=rng.uniform(20, 235, 3),
        background_3x3=np.clip(rng.uniform(20, 235) + 22 * n(3) + 30 * n((3, 3, 1)) + 14 * n((3, 3, 3)), 0, 255),
        tousle=np.clip(n(2), -2, 2),
        blur=float(abs(0.75 * strength * n())) if rng.random() < 0.55 else 0.0,
        motion=float(rng.uniform(1.5, 5)) if happens(0.06) else 0.0,
        noise=float(1.5 + 3.2 * strength * rng.random() ** 2),
        quality=int(np.clip(94 - 26 * strength * rng.random(), 45, 96)),
    )
