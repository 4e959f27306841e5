"""What is packed: synthetic faces, or a folder of images with a subfolder for each identity; how images are encoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from data.errors import DataError, said
from data.loading.decode import check_image
from data.synthetic import DIFFICULTY_SPREAD, SyntheticFaces

IMAGE_SIZE = 112
"""Height and width in pixels of what the field trains on."""
RESIZE_RULE = (
    "JPEG and PNG images that are 112x112 and 8-bit RGB or grey are packed untouched. Any other is turned "
    "upright by its EXIF orientation, converted to 8-bit RGB, scaled with a bicubic filter so that it just covers "
    "112x112, cropped about its centre, and packed as JPEG of quality 95 without colour subsampling."
)
_QUALITY = 95
_MOST_PIXELS = 1 << 26
"""8192 x 8192, for which some 800 MB are needed; a few hundred kilobytes can state any size."""
_SUFFIXES = (".jpg", ".jpeg", ".png")


class Source(Protocol):
    """Images that are encoded on demand and in any process."""

    def encode(self, wanted: npt.NDArray[np.int64]) -> list[bytes | DataError]:
        """Encoded 112x112 images of the rows of `wanted`, or why one cannot be had.

        What a row says is up to the source; here it is (identity, image number). Raises DataError where it makes no
        sense to go on.
        """

    def listing(self) -> Iterator[str]:
        """What it reads, by which a job that goes on is told from another one."""

    def check(self) -> None:
        """Raise DataError when a file that says which images there are is no longer the one that was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSource:
    """Faces of `data.synthetic`: identities from `first_identity` on, each with `images_per_identity` images."""

    identities: int
    images_per_identity: int
    seed: int
    first_identity: int = 0
    difficulty_spread: float = DIFFICULTY_SPREAD

    @property
    def images(self) -> Sequence[int]:
        return [self.images_per_identity] * self.identities

    def encode(self, wanted: npt.NDArray[np.int64]) -> list[bytes | DataError]:
        faces = SyntheticFaces(
            identities=self.identities,
            seed=self.seed,
            first_identity=self.first_identity,
            difficulty_spread=self.difficulty_spread,
        )
        return [faces.jpeg(identity, image) for identity, image in wanted.tolist()]

    def listing(self) -> Iterator[str]:
        yield repr(self)

    def check(self) -> None:
        """Nothing is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """Image files in subfolders. names: the subfolders, one an identity; files: the sorted file names in each."""

    folder: Path
    names: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]

    @classmethod
    def find(cls, folder: Path) -> FolderSource:
        """List `folder/<identity>/<image>`, JPEG and PNG, sorted by name; names that begin with a dot are left out.

        Raises DataError when there is no such image, a subfolder has none, a subfolder's name has a line break in
        it, or a name is not UTF-8.
        """
        try:
            names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
            files = tuple(tuple(sorted(filter(is_image, os.listdir(folder / name)))) for name in names)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read it ({error.strerror}): expected a folder") from None
        if not names:
            raise DataError(f"{folder}: expected a subfolder of images for each identity, found none")
        for name, images in zip(names, files, strict=True):
            bad = next((part for part in (name, *images) if not _is_utf8(part)), None)
            if bad is not None:
                where = folder if bad is name else folder / name
                raise DataError(f"{str(where)!r:.500}: expected names in UTF-8, found {bad!r:.500}: rename it")
            if not images or len(name.splitlines()) != 1:
                raise DataError(f"{folder / name!s:.500}: no JPEG or PNG file in it, or a line break in its name")
        return cls(folder=folder, names=tuple(names), files=files)

    @property
    def images(self) -> Sequence[int]:
        return [len(images) for images in self.files]

    def encode(self, wanted: npt.NDArray[np.int64]) -> list[bytes | DataError]:
        return [self._encode_one(identity, image) for identity, image in wanted.tolist()]

    def listing(self) -> Iterator[str]:
        yield str(self.folder.absolute())
        for name, files in zip(self.names, self.files, strict=True):
            yield "/".join((name, *files))

    def check(self) -> None:
        """The names are in memory."""

    def _encode_one(self, identity: int, image: int) -> bytes | DataError:
        return encode_file(self.folder / self.names[identity] / self.files[identity][image])


def _is_utf8(name: str) -> bool:
    """False for a name that Python could only read with surrogates: no text file can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(name: str) -> bool:
    """Whether a file of that name is taken for an image; those that begin with a dot are not."""
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def encode_file(path: Path) -> bytes | DataError:
    """The image file as `encode_image` makes it, or why it cannot be had."""
    try:
        return encode_image(path.read_bytes())
    except OSError as error:
        return DataError(f"{path}: cannot read it ({error.strerror})")
    except ValueError as error:
        return DataError(f"{path}: {error}")


def encode_image(content: bytes) -> bytes:
    """Make a JPEG or PNG file a 112x112 image, as RESIZE_RULE says.

    Raises ValueError when it does not decode; what is packed untouched must decode as strictly as in training.
    """
    try:
        with _opened(content) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"expected at most {_MOST_PIXELS} pixels, found {image.width} x {image.height}")
            image.load()
            if image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode in ("RGB", "L"):
                check_image(content, (IMAGE_SIZE, IMAGE_SIZE))  # PIL passes over damage that training refuses
                return content
            upright = _rgb(ImageOps.exif_transpose(image))
            fitted = ImageOps.fit(upright, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        raise ValueError("expected a JPEG or PNG image, found something else") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds, and struct.error, TypeError and others for EXIF
        raise ValueError(f"expected a JPEG or PNG image that can be read whole: {said(error):.300}") from None
    encoded = io.BytesIO()
    fitted.save(encoded, "JPEG", quality=_QUALITY, subsampling=0)
    return encoded.getvalue()


def _opened(content: bytes) -> Image.Image:
    """Head alone; PIL warns of images that are refused here in words of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=["JPEG", "PNG"])


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Of 16 bits the upper 8, as `decode_image` takes them; PIL's `convert` would clip them to white."""
    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, found fractions")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.min(initial=0) < 0 or deep.max(initial=0) >= 1 << 16:
            raise ValueError(f"expected pixels of 8 or 16 bits, found {deep.min()} to {deep.max()}")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    return image.convert("RGB")
