"""Chinese characters in the free fonts that Debian packages: real classes, fonts as variation, natural look-alikes.

A class is a character; its images are the character in different fonts (print, handwriting, brush), each a little
turned, scaled, moved, blurred and noisy. Nobody shaped these classes for us: some are hard because they are dense or
have near doubles, and some fonts draw them in forms of their own.

Everything follows from (seed, character, image number) and the font files.

Legend: N images, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
_EM = 44  # pixels a character is drawn at, before it is scaled to SIDE
_FOLDER = Path("/usr/share/fonts")
_HAN = range(0x4E00, 0xA000)

FACES: dict[str, tuple[tuple[str, int], ...]] = {
    "fonts-noto-cjk": (
        ("opentype/noto/NotoSansCJK-Regular.ttc", 0),
        ("opentype/noto/NotoSansCJK-Bold.ttc", 0),
        ("opentype/noto/NotoSerifCJK-Regular.ttc", 0),
        ("opentype/noto/NotoSerifCJK-Bold.ttc", 3),
    ),
    "fonts-ipaexfont-gothic": (("opentype/ipaexfont-gothic/ipaexg.ttf", 0),),
    "fonts-ipaexfont-mincho": (("opentype/ipaexfont-mincho/ipaexm.ttf", 0),),
    "fonts-arphic-bkai00mp": (("truetype/arphic-bkai00mp/bkai00mp.ttf", 0),),
    "fonts-arphic-bsmi00lp": (("truetype/arphic-bsmi00lp/bsmi00lp.ttf", 0),),
    "fonts-arphic-ukai": (("truetype/arphic/ukai.ttc", 0),),
    "fonts-arphic-uming": (("truetype/arphic/uming.ttc", 0),),
    "fonts-cwtex-fs": (("truetype/cwtex/cwfs.ttf", 0),),
    "fonts-cwtex-heib": (("truetype/cwtex/cwheib.ttf", 0),),
    "fonts-cwtex-yen": (("truetype/cwtex/cwyen.ttf", 0),),
    "fonts-dejima-mincho": (("truetype/dejima-mincho/dejima-mincho-r227.ttf", 0),),
    "fonts-horai-umefont": (("truetype/horai-umefont/ume-tmo3.ttf", 0), ("truetype/horai-umefont/ume-hgo5.ttf", 0)),
    "fonts-lxgw-wenkai": (("truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf", 0),),
    "fonts-motoya-l-cedar": (("truetype/motoya-l-cedar/MTLc3m.ttf", 0),),
    "fonts-motoya-l-maruberi": (("truetype/motoya-l-maruberi/MTLmr3m.ttf", 0),),
    "fonts-kouzan-mouhitsu": (
        ("truetype/kouzan-mouhitsu/kouzan-mouhitsu.ttf", 0),
        ("truetype/kouzan-mouhitsu/kouzan-mouhitsu-gyosho.ttf", 0),
    ),
    "fonts-aoyagi-kouzan-t": (("truetype/aoyagi-kouzan-t/AoyagiKouzanT.ttf", 0),),
    "fonts-aoyagi-soseki": (("truetype/aoyagi-soseki/aoyagi-soseki.ttf", 0),),
    "fonts-seto": (("truetype/seto/setofont.ttf", 0),),
    "fonts-wqy-zenhei": (("truetype/wqy/wqy-zenhei.ttc", 0),),
    "fonts-komatuna": (("truetype/komatuna/komatuna.ttf", 0),),
    "fonts-konatu": (("truetype/konatu/Konatu.ttf", 0),),
}
"""Debian package: its font files and the face in them."""


class MissingFontsError(RuntimeError):
    """Fonts of the experiment are not installed."""


@dataclass(frozen=True, slots=True)
class Face:
    name: str
    font: ImageFont.FreeTypeFont
    characters: frozenset[int]


def open_faces() -> list[Face]:
    """All faces, in the order of FACES. Raises MissingFontsError that names the packages to install."""
    missing = [p for p, files in FACES.items() if not all((_FOLDER / file).is_file() for file, _ in files)]
    if missing:
        raise MissingFontsError(
            f"expected the fonts of {len(FACES)} Debian packages in {_FOLDER}, {len(missing)} are missing: "
            f"apt-get install {' '.join(missing)}"
        )
    return [_open(_FOLDER / file, index) for files in FACES.values() for file, index in files]


def _open(file: Path, index: int) -> Face:
    table = TTCollection(file, lazy=True).fonts[index] if file.suffix == ".ttc" else TTFont(file, lazy=True)
    characters = frozenset(code for code in table.getBestCmap() if code in _HAN)
    return Face(f"{file.stem}-{index}", ImageFont.truetype(str(file), _EM, index=index), characters)


def _print(face: Face, code: int) -> npt.NDArray[np.uint8]:
    """The character in white on black, uint8, cut to its ink; empty where the font has an empty glyph."""
    canvas = Image.new("L", (2 * _EM, 2 * _EM), 0)
    ImageDraw.Draw(canvas).text((_EM // 2, _EM // 2), chr(code), fill=255, font=face.font)
    box = canvas.getbbox()
    return np.asarray(canvas.crop(box)) if box else np.zeros((0, 0), np.uint8)


def choose_characters(faces: list[Face], count: int, *, seed: int) -> list[int]:
    """`count` characters that every face draws, in an order drawn by the seed; code points."""
    common = sorted(frozenset.intersection(*(face.characters for face in faces)))
    order = np.random.default_rng([seed, 1]).permutation(len(common))
    chosen: list[int] = []
    for code in (common[place] for place in order):
        if len(chosen) == count:
            break
        # Fonts map characters that they lack to an empty glyph or to a box: anything that small is not one.
        if all(_print(face, code).size > 100 for face in faces):
            chosen.append(code)
    if len(chosen) < count:
        raise ValueError(f"expected {count} characters that all {len(faces)} faces draw, there are {len(chosen)}")
    return chosen


def _seen(glyph: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """uint8 (S, S): as a camera might see it."""
    height, width = glyph.shape
    scale = (SIDE - 6) / max(height, width) * rng.uniform(0.85, 1.05)
    turn = np.deg2rad(rng.normal(0, 4))
    stretch, shear = rng.uniform(0.92, 1.08), rng.normal(0, 0.06)
    linear = scale * np.array([[np.cos(turn) * stretch, -np.sin(turn) + shear], [np.sin(turn), np.cos(turn) / stretch]])
    centre = SIDE / 2 + rng.normal(0, 1.0, 2) - linear @ np.array([width / 2, height / 2])
    affine = np.concatenate([linear, centre[:, None]], axis=1)
    image: npt.NDArray[Any] = cv2.warpAffine(glyph, affine, (SIDE, SIDE), flags=cv2.INTER_AREA).astype(np.float32)
    if (blur := rng.gamma(1.0, 0.5)) > 0.1:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    ink, paper = rng.uniform(140, 255), rng.uniform(0, 70)
    image = paper + image / 255 * (ink - paper) + rng.normal(0, rng.uniform(2, 25), image.shape)
    return image.clip(0, 255).astype(np.uint8)


def draw(count: int, images: int, *, seed: int) -> npt.NDArray[np.uint8]:
    """`images` of each of `count` characters, uint8 (count, images, S, S); faces change from image to image.

    Raises MissingFontsError.
    """
    faces = open_faces()
    drawn = np.zeros((count, images, SIDE, SIDE), np.uint8)
    for place, code in enumerate(choose_characters(faces, count, seed=seed)):
        glyphs = [_print(face, code) for face in faces]
        rng = np.random.default_rng([seed, 2, code])
        rounds = [rng.permutation(len(faces)) for _ in range(-(-images // len(faces)))]
        for image, face in enumerate(np.concatenate(rounds)[:images]):
            drawn[place, image] = _seen(glyphs[face], rng)
    return drawn
