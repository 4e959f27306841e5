"""Image files as `pack` stores them: untouched where they can be, upright, 112x112 and RGB where not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.sources import encode_image


def _encode(image: Image.Image, kind: str, **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def _picture(width: int = 112, height: int = 112, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_the_right_size_are_untouched(kind: str, mode: str) -> None:
    content = _encode(_picture().convert(mode), kind)
    assert encode_image(content) is content


@pytest.mark.parametrize(("width", "height"), [(224, 224), (200, 150), (60, 90), (112, 113)])
def test_other_sizes_cover_and_are_cropped(width: int, height: int) -> None:
    picture = _picture(width, height)
    with Image.open(io.BytesIO(encode_image(_encode(picture, "PNG")))) as image:
        assert (image.size, image.mode, image.format) == ((112, 112), "RGB", "JPEG")
        got = np.asarray(image, np.float64)
    scale = 112 / min(width, height)
    scaled = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 112) // 2, (scaled.height - 112) // 2
    crop = np.asarray(scaled.crop((left, top, left + 112, top + 112)), np.float64)
    assert np.abs(got - crop).mean() < 3  # of 255: half a pixel of crop and the JPEG


def test_orientation_and_modes() -> None:
    picture = _picture(224, 224)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = encode_image(_encode(picture.rotate(90), "JPEG", exif=exif, quality=95))
    plain = encode_image(_encode(picture, "JPEG", quality=95))
    difference = np.asarray(Image.open(io.BytesIO(turned)), float) - np.asarray(Image.open(io.BytesIO(plain)), float)
    assert np.abs(difference).mean() < 3
    for mode in ("RGBA", "P", "LA", "1", "I;16"):
        content = _encode(picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode), "PNG")
        with Image.open(io.BytesIO(encode_image(content))) as image:
            assert (image.size, image.mode) == ((112, 112), "RGB")
