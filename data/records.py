"""A training set in a folder: `train.rec`, `train.idx` and `property`, in each layout that the field packs."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.header import HEADER, HeaderError, class_of, unpack
from data.index import read_index
from data.layout import Labels, find_layout, labels_of_images, labels_of_ranges
from data.properties import read_properties
from data.recordio import HEAD, MAGIC, MAX_LENGTH, RecordError, RecordReader, images_only_action

_SPREAD = 1024
"""Images looked at across the whole file when a set with identity headers is opened: a few milliseconds, and an
index of another file, or labels that disagree with the identity headers, show at once."""

_PLAIN = struct.Struct(HEAD.format + HEADER.format.removeprefix("<"))
"""Heads of a record in one part and of an image with one label: what nearly all images begin with."""


class RecordSet:
    """Every image of a set, numbered 0 .. num_samples - 1 (the sample id) in file order, whatever the layout.

    layout "insightface": images at keys 1..N, then identity headers with the range of keys of each identity, and
    key 0, which says where these headers lie. layout "sequential": every record is an image.

    Labels are float32 in the format. Key ranges are exact up to 2^24 and give the classes without a touch of the
    images; in a larger set every image's own header is read instead, and ranges are only counted (by the index, in
    integers). Class numbers above 2^24 must be stored as pairs, see `data.header.class_labels`.

    num_classes, num_samples; image_size: (height, width); labels: int64 (num_samples,), the class of every sample,
    not to be written to. Threads may read at once; pickling keeps the folder only.
    """

    def __init__(self, folder: Path, reader: RecordReader) -> None:
        """For `open`. Reads all that there is to know but the images."""
        self.folder = folder
        self._reader = reader
        properties = read_properties(folder / "property")
        self.num_classes = properties.num_classes
        self.image_size = properties.image_size
        self._pair = properties.pair
        index = read_index(folder / "train.idx", reader)
        layout = find_layout(folder / "train.idx", index, reader)
        self.layout = layout.name
        self._images = layout.images
        labels = labels_of_ranges(layout, reader)
        if len(layout.identities):
            self._check_classes(len(layout.identities), "identity headers")
        if labels is None or not self._spread_agrees(labels):
            # Identity headers need not stand in the order of the classes; the images' own headers always tell.
            labels = labels_of_images(layout, reader, pair=self._pair, num_classes=self.num_classes)
        if not len(layout.identities):
            self._check_classes(int(labels.max()) + 1, "classes, by the highest label")
        self.labels: Labels = labels

    @classmethod
    def open(cls, folder: Path) -> RecordSet:
        """Open and check a set. Raises DataError, one line, for anything missing, damaged or contradictory."""
        folder = Path(folder)
        path = folder / "train.rec"
        if not path.is_file():
            raise DataError(f"{path}: missing: expected a folder with train.rec, train.idx and property")
        return cls(folder, RecordReader(path))

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return RecordSet.open, (self.folder,)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self._images.offsets)

    def image(self, sample: int) -> tuple[int, memoryview]:
        """(label, encoded image), the image a view into the file.

        Raises RecordError when the record is damaged or has no image, or its label is none of this set's or not the
        one of its identity header; IndexError when there is no such sample.
        """
        if 0 <= sample < len(self.labels) and not self._pair:
            # Plain and of the expected class, seen at once: decoding threads take turns at whatever Python does.
            begin, label, view = self._images.offsets.item(sample), self.labels.item(sample), self._reader.view
            if (start := begin + _PLAIN.size) < len(view):
                magic, length, flag, found, _, _ = _PLAIN.unpack_from(view, begin)
                end = begin + HEAD.size + length
                plain = magic == MAGIC and length <= MAX_LENGTH and not flag and found == label
                if plain and start < end and end + 3 & ~3 <= len(view):
                    return label, view[start:end]
        label, image = self._read(sample)
        if label != self.labels[sample]:
            expected = f"label {self.labels[sample]}, as its identity header says"
            raise self._error(sample, expected, f"label {label}", images_only_action(self._reader.path))
        return label, image

    def close(self) -> None:
        """Unmap the file."""
        self._reader.close()

    def _read(self, sample: int) -> tuple[int, memoryview]:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample}: expected 0 to {self.num_samples - 1}")
        try:
            header, image = unpack(self._reader.read_at(int(self._images.offsets[sample])))
            label = class_of(header.labels, pair=self._pair)
            if not len(image):
                raise HeaderError("an image behind the header", "none")
            if label >= self.num_classes:
                raise HeaderError(f"a class number from 0 to {self.num_classes - 1}", f"label {label}")
        except HeaderError as error:
            raise self._error(sample, error.expected, error.found, "correct property, or pack the set again") from None
        return label, image

    def _error(self, sample: int, expected: str, found: str, action: str) -> RecordError:
        where = f"{found} in key {self._images.keys[sample]}"
        return RecordError(self._reader.path, int(self._images.offsets[sample]), expected, where, action)

    def _spread_agrees(self, labels: Labels) -> bool:
        spread = np.unique(np.linspace(0, self.num_samples - 1, _SPREAD).astype(np.int64))
        return all(self._read(sample)[0] == labels[sample] for sample in spread.tolist())

    def _check_classes(self, counted: int, what: str) -> None:
        if counted != self.num_classes:
            raise DataError(
                f"{self.folder / 'property'}: expected as many classes as {self._reader.path.name} has, found "
                f"{self.num_classes} against {counted} {what} (correct the first number of property)"
            )
