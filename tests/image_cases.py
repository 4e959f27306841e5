"""Images for tests, good, odd and damaged, and a training set that lives in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

SIZE = (112, 112)


def picture(seed: int, size: tuple[int, int] = SIZE) -> npt.NDArray[np.uint8]:
    """Smooth colours with some noise, asymmetric, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(seed: int, *, quality: int = 90, chroma: str = "420", size: tuple[int, int] = SIZE) -> bytes:
    pixels = picture(seed, size)
    if chroma == "Gray":
        grey = np.ascontiguousarray(pixels[..., :1])
        return bytes(simplejpeg.encode_jpeg(grey, quality, colorspace="GRAY", colorsubsampling="Gray"))
    return bytes(simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=chroma))


def photograph(width: int = 112, height: int = 112, seed: int = 0) -> Image.Image:
    """Smooth colours of any size."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    """Images that decode, though not every decoder does them alike."""
    pixels = picture(0)
    image = Image.fromarray(pixels)
    upside = Image.Exif()
    upside[0x0112] = 6  # orientation: turn by 90 degrees
    alpha = Image.fromarray(np.dstack([pixels, np.full(SIZE, 100, np.uint8)]))
    deep = pixels.astype(np.uint16) * 256 + 127
    return {
        "grey": jpeg(0, chroma="Gray"),
        "cmyk": saved(image.convert("CMYK"), "JPEG", quality=90),
        "progressive": saved(image, "JPEG", quality=90, progressive=True),
        "restart markers": saved(image, "JPEG", quality=90, restart_marker_rows=1),
        "exif orientation": saved(image, "JPEG", quality=90, exif=upside),
        "bytes behind the end": jpeg(0) + b"junk" * 5,
        "png": saved(image, "PNG"),
        "png grey": saved(image.convert("L"), "PNG"),
        "png alpha": saved(alpha, "PNG"),
        "png palette": saved(image.convert("P"), "PNG"),
        "png 16 bit": cv2.imencode(".png", deep[..., ::-1])[1].tobytes(),
        "png 16 bit grey": cv2.imencode(".png", deep[..., 0])[1].tobytes(),
    }


def damaged_images() -> dict[str, tuple[bytes, str]]:
    """Images that must be refused, with a part of the reason."""
    good = jpeg(0)
    data = good.index(b"\xff\xda") + 14  # where entropy-coded data begin
    png = saved(Image.fromarray(picture(0)), "PNG")
    flipped = bytearray(png)
    flipped[500] ^= 255
    cut = bytearray(good)
    cut[data + 400 : data + 402] = b"\xff\xd9"
    garbage = bytearray(good)
    garbage[data + 300 : data + 400] = np.random.default_rng(0).bytes(100).replace(b"\xff", b"\0")
    return {
        "empty": (b"", "0 bytes"),
        "one byte": (b"\xff", "expected JPEG or PNG"),
        "text": (b"no image at all", "expected JPEG or PNG"),
        "half": (good[: len(good) // 2], "damaged JPEG: Premature end"),
        "half, then an end": (good[: len(good) // 2] + b"\xff\xd9", "damaged JPEG: Corrupt"),
        "no end": (good[:-2], "damaged JPEG: Premature end"),
        "head only": (good[: data - 14], "damaged JPEG"),
        "ends within the data": (bytes(cut), "damaged JPEG: Corrupt"),
        "garbage within the data": (bytes(garbage), "damaged JPEG: Corrupt"),
        "another size": (jpeg(0, size=(112, 120)), "expected 112 x 112 pixels (height x width), found 112 x 120"),
        "bmp": (saved(Image.fromarray(picture(0)), "BMP"), "expected JPEG or PNG"),
        "png half": (png[: len(png) // 2], "damaged PNG"),
        "png checksum": (bytes(flipped), "damaged PNG"),
        "png head only": (png[:20], "expected JPEG or PNG"),
        "png of another size": (saved(Image.fromarray(picture(0, (96, 112))), "PNG"), "found 96 x 112"),
    }


class MemorySet:
    """A training set of encoded images; the label of sample i is i % 10."""

    def __init__(self, images: Sequence[bytes], size: tuple[int, int] = SIZE) -> None:
        self.images, self.image_size, self.num_samples = images, size, len(images)
        self.labels = np.arange(len(images)) % 10
        self.reads, self.far = 0, False

    def ahead(self, samples: object) -> None:
        raise AssertionError("nothing is far away here")

    def image_batch(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[memoryview]]:
        return samples % 10, [self.image(sample)[1] for sample in samples.tolist()]

    def image(self, sample: int) -> tuple[int, memoryview]:
        self.reads += 1
        return sample % 10, memoryview(self.images[sample])
