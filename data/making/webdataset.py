"""WebDataset shards: tar files in which `<key>.jpg` or `.png` is an image and `<key>.cls` its class in digits.

Read in place, never unpacked: names are only compared, and no path of a tar file is ever written to.
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from data.errors import DataError, said
from data.files import check_same, read_spans
from data.making.sources import encode_image

SHARD_IMAGES = 10_000
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png"}
_CLASS_BYTES = 20
_CRAFTED = (ValueError, OverflowError, MemoryError, RecursionError)
"""What heads make Python's reader raise when somebody wrote them so: absurd sizes, names within names."""


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


class Shards:
    """Where each image of some shards lies, and its class."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads all heads. Raises DataError for a file that is no tar, or a key without exactly one image and class."""
        self.paths = paths
        rows = {name: array("q") for name in ("shard", "offset", "size", "label")}
        for number, path in enumerate(paths):
            for offset, size, label in _samples(path):
                for values, value in zip(rows.values(), (number, offset, size, label), strict=True):
                    values.append(value)
        *rows_3N, self.labels = (np.array(row, np.int64) for row in rows.values())
        self.rows = np.stack(rows_3N, axis=1)
        """Shard, byte offset and bytes of each image: int64 (N, 3)."""
        if not len(self.labels):
            raise DataError(f"{paths[0].parent}: the tar files hold no images with a .cls")

    def images(self, samples: Iterable[int]) -> Iterator[bytes]:
        """Encoded images of some samples, in that order."""
        return read_spans(self.paths, (self.rows[sample].tolist() for sample in samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSource:
    """The images of shards; rows as those of `Shards`. identity: of the files."""

    paths: Sequence[Path]
    identity: Sequence[str]

    def encode(self, wanted: npt.NDArray[np.int64]) -> list[bytes | DataError]:
        """Raises DataError when a shard is no longer there, or another one."""
        self.check(np.unique(wanted[:, 0]).tolist())
        encoded: list[bytes | DataError] = []
        try:
            for row, content in zip(wanted.tolist(), read_spans(self.paths, wanted.tolist()), strict=True):
                try:
                    encoded.append(encode_image(content))
                except ValueError as error:
                    encoded.append(DataError(f"{self.paths[row[0]]}: the image at byte {row[1]}: {error}"))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read it ({error.strerror})") from None
        return encoded

    def listing(self) -> Iterator[str]:
        yield from self.identity

    def check(self, numbers: Iterable[int] | None = None) -> None:
        check_same(self.paths, self.identity, numbers)


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """(offset, bytes, class) of every image of a shard, in the order of the images."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            end = file.seek(0, io.SEEK_END)
            for member, key, suffix in _keyed(tar, file):
                if suffix in ("jpg", "jpeg", "png"):
                    if member.offset_data + member.size > end:
                        raise DataError(
                            f"{path}: {member.name!s:.300}: ends behind the file: it was cut, copy it again"
                        )
                    if key in images:
                        raise _doubled(path, key, member.name, "image")
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    if key in classes:
                        raise _doubled(path, key, member.name, ".cls file")
                    file.seek(member.offset_data)
                    text = file.read(min(member.size, _CLASS_BYTES)).decode("ascii", "replace").strip()
                    if not (text.isascii() and text.isdigit() and len(text) < 16):
                        raise DataError(f"{path}: {member.name!s:.300}: expected a class number, found {text!r}")
                    classes[key] = int(text)
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, *_CRAFTED) as error:
        raise DataError(f"{path}: cannot read it as an uncompressed tar file ({said(error):.300})") from None
    if odd := sorted(images.keys() ^ classes.keys()):
        lacks = "an image" if odd[0] in classes else "a .cls file"
        raise DataError(
            f"{path}: {odd[0]!s:.300} lacks {lacks}: expected both for each of {len(images | classes)} keys"
        )
    for key, (offset, size) in images.items():
        yield offset, size, classes[key]


def _keyed(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Files with their key and suffix, in small letters. Raises ReadError for damage that tarfile takes for the end."""
    place = -1
    for member in tar:
        if member.size < 0 or member.offset <= place:
            raise tarfile.ReadError("a size below 0")  # which would lead back, and round for ever
        place = member.offset
        _, dot, suffix = member.name.rpartition("/")[2].partition(".")
        if member.isfile() and dot:
            yield member, member.name[: len(member.name) - len(suffix) - 1], suffix.lower()
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged or cut at byte {tar.offset}: copy it again")


def _doubled(path: Path, key: str, name: str, kind: str) -> DataError:
    return DataError(
        f"{path}: {key!s:.300}: expected one {kind} for each key, found a second one, {name!s:.300}: write the tar "
        "file anew with a key for each image"
    )
