"""Images to embed, row by row: a record set, a folder of aligned faces, a verification set.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from backbones import IMAGE_SIZE
from data.errors import DataError
from data.loading.decode import DecodeError, Pixels, decode_image
from data.making.pack import every_image
from data.making.sources import FolderSource, encode_image, is_image
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from evaluation.embed.files import Ints

Sidecars = dict[str, "bytes | Ints"]
"""What says which image a row is of, by the end of a file's name: a text, or an array for a .npy."""


class Source(Protocol):
    """N images."""

    where: str

    @property
    def stamp(self) -> int:
        """Tells apart what else would be taken for the same on two ranks."""

    def __len__(self) -> int: ...

    def decode(self, row: int, out: Pixels) -> None:
        """Write the pixels of image `row`, RGB (112, 112, 3), to `out`; threads may do so at once.

        Raises DecodeError or RecordError where the image is damaged, DataError where it cannot be had.
        """

    def sidecars(self) -> Sidecars:
        """What goes beside the embeddings."""


class RecordImages:
    """The samples of a record set."""

    def __init__(self, records: RecordSet) -> None:
        """Raises DataError for images of another size than 112 x 112."""
        self._records, self.where = records, records.address
        if records.image_size != IMAGE_SIZE:
            height, width = records.image_size
            raise DataError(
                f"{self.where}: expected images of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels, property states "
                f"{height} x {width}"
            )

    @property
    def stamp(self) -> int:
        """See `Source`."""
        return _stamp(self._records.labels)

    def __len__(self) -> int:
        return self._records.num_samples

    def decode(self, row: int, out: Pixels) -> None:
        """See `Source`."""
        decode_image(self._records.image(row)[1], IMAGE_SIZE, out=out)

    def sidecars(self) -> Sidecars:
        """None: the set has its labels."""
        return {}


class PairImages:
    """The images of a verification set: rows 2i and 2i + 1 are pair i."""

    def __init__(self, path: Path) -> None:
        """Raises DataError."""
        self._images, self._same = read_bin(path)
        self.where = str(path)

    @property
    def stamp(self) -> int:
        """See `Source`."""
        return _stamp(np.array([len(image) for image in self._images]), np.asarray(self._same))

    def __len__(self) -> int:
        return len(self._images)

    def decode(self, row: int, out: Pixels) -> None:
        """See `Source`."""
        decode_image(self._images[row], IMAGE_SIZE, out=out)

    def sidecars(self) -> Sidecars:
        """None: the set has its pairs."""
        return {}


class FolderImages:
    """Image files of a folder, or of its subfolders, one an identity: in the order and with the pixels that
    `python -m data pack folder` would give them.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the names; those that begin with a dot are left out.

        Raises DataError where there are no images, a subfolder has none, images lie beside subfolders, or a name has a
        line break in it or is not UTF-8.
        """
        self.where = str(folder)
        loose, has_subfolders = _listed(folder)
        if loose and has_subfolders:
            raise DataError(
                f"{folder}: expected images in subfolders, one an identity, or no subfolders, found both: move "
                f"{loose[0]} into one"
            )
        if not loose and not has_subfolders:
            raise DataError(f"{folder}: expected JPEG or PNG files, or subfolders of them, found none")
        found = FolderSource(folder=folder, names=("",), files=(loose,)) if loose else FolderSource.find(folder)
        self._found, self._place_N2 = found, every_image(found.images)
        names = hashlib.sha256()
        for name in self._names():
            try:
                names.update(f"{name}\n".encode())
            except UnicodeEncodeError:
                raise _odd_name(folder / name) from None
            if len(name.splitlines()) != 1:
                raise _odd_name(folder / name)
        self.stamp = _number(names)

    def __len__(self) -> int:
        return len(self._place_N2)

    def name(self, row: int) -> str:
        """Path of an image within the folder."""
        identity, image = self._place_N2[row].tolist()
        name: str = os.path.join(self._found.names[identity], self._found.files[identity][image])
        return name

    def decode(self, row: int, out: Pixels) -> None:
        """See `Source`. Those of another size or kind are made as `data.making.sources.RESIZE_RULE` says."""
        path = self._found.folder / self.name(row)
        try:
            encoded = encode_image(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot read it ({error.strerror})") from None
        except ValueError as error:
            raise DecodeError(f"{path}: {error}") from None
        decode_image(encoded, IMAGE_SIZE, out=out)

    def sidecars(self) -> Sidecars:
        """names.txt: a line for each row. labels.npy: number of its subfolder, where there are subfolders."""
        text = "".join(f"{name}\n" for name in self._names()).encode()
        label_N = np.ascontiguousarray(self._place_N2[:, 0])
        return {"names.txt": text} | ({} if self._found.names == ("",) else {"labels.npy": label_N})

    def _names(self) -> Iterator[str]:
        for name, files in zip(self._found.names, self._found.files, strict=True):
            yield from (os.path.join(name, file) for file in files)


def _stamp(*arrays: npt.NDArray[Any]) -> int:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return _number(found)


def _number(found: hashlib._Hash) -> int:
    return int.from_bytes(found.digest()[:7], "big")


def _listed(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Image files that lie in the folder itself, sorted; whether it has subfolders."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        loose = (e.name for e in shown if is_image(e.name) and not e.is_dir())
        return tuple(sorted(loose)), any(entry.is_dir() for entry in shown)
    except OSError as error:
        raise DataError(f"{folder}: cannot read it ({error.strerror}): expected a folder of images") from None


def _odd_name(path: Path) -> DataError:
    return DataError(f"{str(path)!r:.500}: expected a name in UTF-8 without a line break: rename it")
