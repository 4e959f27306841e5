"""WebDataset shards: tar files in which `<key>.jpg` or `.png` is an image and `<key>.cls` its class in digits.

Read in place, never unpacked: names are only compared, and no path of a tar file is ever written to.
"""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data.errors import DataError

SHARD_IMAGES = 10_000
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png"}
_CLASS_BYTES = 20
_TAR = re.compile(r".*\.tar")


def write_shards(folder: Path, images: Iterable[tuple[int, bytes]], *, per_shard: int = SHARD_IMAGES) -> list[Path]:
    """Write (label, encoded image) as shards `000000.tar`, `000001.tar` …, in their order; their paths.

    The same images give the same bytes. Raises DataError for an image that is neither JPEG nor PNG.
    """
    numbered = enumerate(images)
    paths: list[Path] = []
    while part := list(islice(numbered, 1)):
        paths.append(folder / f"{len(paths):06d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (label, image) in chain(part, islice(numbered, per_shard - 1)):
                suffix = _SUFFIXES.get(image[:2])
                if suffix is None:
                    found = image[:8].hex()
                    raise DataError(f"image {number}: expected JPEG or PNG, found bytes that begin with {found!r}")
                for name, content in ((f"{number:09d}.{suffix}", image), (f"{number:09d}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return paths


def find_shards(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted. Raises DataError when there is none."""
    paths = sorted(path for path in folder.iterdir() if _TAR.fullmatch(path.name)) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder}: expected .tar files in it, found none")
    return paths


class Shards:
    """Where each image of some shards lies, and its class."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads all heads. Raises DataError for a file that is no tar, an image without a class, or the other way."""
        self.paths = paths
        rows = {name: array("q") for name in ("shard", "offset", "size", "label")}
        for number, path in enumerate(paths):
            for offset, size, label in _samples(path):
                for values, value in zip(rows.values(), (number, offset, size, label), strict=True):
                    values.append(value)
        self._shard_N, self._offset_N, self._size_N, self.labels = (np.array(row, np.int64) for row in rows.values())
        if not len(self.labels):
            raise DataError(f"{paths[0].parent}: the tar files hold no images with a .cls")

    def images(self, samples: Iterable[int]) -> Iterator[bytes]:
        """Encoded images of some samples, in that order."""
        number, file = -1, io.BytesIO()
        try:
            for sample in samples:
                if self._shard_N[sample] != number:
                    file.close()
                    number = int(self._shard_N[sample])
                    file = self.paths[number].open("rb")  # type: ignore[assignment]
                file.seek(int(self._offset_N[sample]))
                yield file.read(int(self._size_N[sample]))
        finally:
            file.close()


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """(offset, bytes, class) of every image of a shard, in the order of the images."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                key, dot, suffix = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or not dot:
                    continue
                key = member.name[: len(member.name) - len(suffix) - 1]
                if suffix.lower() in ("jpg", "jpeg", "png"):
                    images[key] = (member.offset_data, member.size)
                elif suffix.lower() == "cls":
                    file.seek(member.offset_data)
                    text = file.read(min(member.size, _CLASS_BYTES)).decode("ascii", "replace").strip()
                    if not (text.isascii() and text.isdigit() and len(text) < 16):
                        raise DataError(f"{path}: {member.name}: expected a class number, found {text!r}")
                    classes[key] = int(text)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot read it as an uncompressed tar file ({error})") from None
    if odd := sorted(images.keys() ^ classes.keys()):
        lacks = "an image" if odd[0] in classes else "a .cls file"
        raise DataError(f"{path}: {odd[0]} lacks {lacks}: expected both for each of {len(images | classes)} keys")
    for key, (offset, size) in images.items():
        yield offset, size, classes[key]
