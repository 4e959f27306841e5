"""Image files as `pack` stores them: untouched where they can be, upright, 112x112 and RGB where not."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.loading.decode import decode_image
from data.making.sources import _rgb, encode_file, encode_image
from tests.image_cases import photograph, saved


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_the_right_size_are_untouched(kind: str, mode: str) -> None:
    content = saved(photograph().convert(mode), kind)
    assert encode_image(content) is content


@pytest.mark.parametrize(("width", "height"), [(224, 224), (200, 150), (60, 90), (112, 113)])
def test_other_sizes_cover_and_are_cropped(width: int, height: int) -> None:
    picture = photograph(width, height)
    with Image.open(io.BytesIO(encode_image(saved(picture, "PNG")))) as image:
        assert (image.size, image.mode, image.format) == ((112, 112), "RGB", "JPEG")
        got = np.asarray(image, np.float64)
    scale = 112 / min(width, height)
    scaled = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 112) // 2, (scaled.height - 112) // 2
    crop = np.asarray(scaled.crop((left, top, left + 112, top + 112)), np.float64)
    assert np.abs(got - crop).mean() < 3  # of 255: half a pixel of crop and the JPEG


def test_orientation_and_modes() -> None:
    picture = photograph(224, 224)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = encode_image(saved(picture.rotate(90), "JPEG", exif=exif, quality=95))
    plain = encode_image(saved(picture, "JPEG", quality=95))
    difference = np.asarray(Image.open(io.BytesIO(turned)), float) - np.asarray(Image.open(io.BytesIO(plain)), float)
    assert np.abs(difference).mean() < 3
    for mode in ("RGBA", "P", "LA", "1", "I;16"):
        content = saved(picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode), "PNG")
        with Image.open(io.BytesIO(encode_image(content))) as image:
            assert (image.size, image.mode) == ((112, 112), "RGB")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_become_8_as_in_training(channels: int) -> None:
    grey = np.arange(112 * 112).reshape(112, 112).astype(np.uint16) * 5
    deep = np.dstack([grey, grey[::-1], grey.T, grey][:channels])
    content = cv2.imencode(".png", deep)[1].tobytes()
    expected = decode_image(content, (112, 112))
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(_rgb(image)), expected)
    larger = cv2.imencode(".png", deep.repeat(2, axis=0).repeat(2, axis=1))[1].tobytes()
    got = decode_image(encode_image(larger), (112, 112)).astype(int)
    assert np.abs(got - expected).mean() < 8
    assert expected.std() > 40


def test_pixels_that_have_no_scale() -> None:
    wide = np.full((112, 112), 1000, np.int32)
    np.testing.assert_array_equal(np.asarray(_rgb(Image.fromarray(wide))), 3)
    for bad in (wide - 1001, wide << 10, wide.astype(np.float32)):
        with pytest.raises(ValueError, match="expected pixels of 8 or 16 bits"):
            _rgb(Image.fromarray(bad))


@pytest.mark.parametrize(
    ("tag", "kind", "value", "raised"),
    [
        (0x010E, 5, 0, AttributeError),
        (0x011A, 1, 0, TypeError),
        (0x011A, 6, 0xFFFFFFFF, struct.error),
        (0x0201, 1, 0, struct.error),
    ],
)
def test_broken_exif_is_a_bad_image(tmp_path: Path, tag: int, kind: int, value: int, raised: type[Exception]) -> None:
    """An orientation and a tag of a kind that it cannot have, which PIL fails to write back."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", tag, kind, 1, value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    content = saved(photograph(150, 150), "JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as image, pytest.raises(raised):
        ImageOps.exif_transpose(image)
    (tmp_path / "a.jpg").write_bytes(content)
    assert "a.jpg: expected a JPEG or PNG image" in str(encode_file(tmp_path / "a.jpg"))


@pytest.mark.parametrize("error", [struct.error("unpack requires"), TypeError("odd"), KeyError(), RecursionError()])
def test_whatever_pil_raises_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(_: Image.Image) -> None:
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", fails)
    (tmp_path / "a.jpg").write_bytes(saved(photograph(150, 150), "JPEG"))
    assert "a.jpg: expected a JPEG or PNG image" in str(encode_file(tmp_path / "a.jpg"))
