"""Images of a set by their number, checked against what opening the set found out."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.rec.header import HEADER, HeaderError, class_of, unpack
from data.rec.layout import Labels
from data.rec.properties import Properties
from data.rec.recordio import HEAD, MAGIC, MAX_LENGTH, RecordError, RecordReader, Records, images_only_action
from data.stores.cache import Table

_PLAIN = struct.Struct(HEAD.format + HEADER.format.removeprefix("<"))
"""Heads of a record in one part and of an image with one label: what nearly all images begin with."""


class Samples:
    """Reads images of one or several record files. Threads may read at once."""

    def __init__(self, readers: Sequence[Records], table: Table, properties: Properties) -> None:
        self._readers, self._properties, self._pair = readers, properties, properties.pair
        self._layout = table.layout
        self._offsets, self._labels, self._keys = table.offsets, table.labels, table.keys
        self._starts: list[int] = np.cumsum([0, *table.counts[:-1]]).tolist()
        self._views = [reader.view if isinstance(reader, RecordReader) else None for reader in readers]

    def image(self, sample: int) -> tuple[int, memoryview]:
        """(label, encoded image), the image a view into the file where it can be.

        Raises RecordError when the record is damaged or has no image, or its label is none of this set's or not the
        one of its identity header; IndexError when there is no such sample.
        """
        if 0 <= sample < len(self._labels) and not self._pair:
            # Plain and of the expected class, seen at once: decoding threads take turns at whatever Python does.
            view = self._views[0] if len(self._views) == 1 else self._views[self._file(sample)]
            if view is not None:
                begin, label = self._offsets.item(sample), self._labels.item(sample)
                if (start := begin + _PLAIN.size) < len(view):
                    magic, length, flag, found, _, _ = _PLAIN.unpack_from(view, begin)
                    end = begin + HEAD.size + length
                    plain = magic == MAGIC and length <= MAX_LENGTH and not flag and found == label
                    if plain and start < end and end + 3 & ~3 <= len(view):
                        return label, view[start:end]
        label, image = self._read(sample)
        if label != self._labels[sample]:
            path = self._readers[self._file(sample)].path
            expected, action = f"label {self._labels[sample]}, as when the set was opened", "open it again"
            if "insightface" in self._layout:
                expected = f"label {self._labels[sample]}, as its identity header says"
                action = images_only_action(path)
            raise self._error(sample, expected, f"label {label}", action)
        return label, image

    def image_batch(self, samples: npt.NDArray[np.int64]) -> tuple[Labels, list[memoryview]]:
        """`image` of each of some samples (n,), in less time: what is plain is seen of all at once.

        int64 (n,) labels, n encoded images.
        """
        view = self._views[0] if len(self._views) == 1 else None
        if view is None or self._pair:
            return self._one_by_one(samples)
        begins, labels = self._offsets[samples], self._labels[samples]
        magic, head, flag, found = self._readers[0].words(begins, (0, 1, 2, 3))
        starts, ends = begins + _PLAIN.size, begins + HEAD.size + head
        plain = (magic == MAGIC) & (head <= MAX_LENGTH) & (flag == 0) & (found.view(np.float32) == labels)
        plain &= (starts < ends) & (ends + 3 & ~3 <= len(view))
        if plain.all():
            return labels, [view[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return self._one_by_one(samples)

    def agree(self, at_most: int) -> bool:
        """Whether so many images, spread over all, are of the classes that the table says. Raises RecordError."""
        spread = np.unique(np.linspace(0, len(self._offsets) - 1, at_most).astype(np.int64))
        self.ahead(spread)
        return all(self._read(sample)[0] == self._labels[sample] for sample in spread.tolist())

    def ahead(self, samples: npt.NDArray[np.int64]) -> None:
        """Some samples are going to be read: those that are far away are got meanwhile."""
        files = np.searchsorted(self._starts, samples, side="right") - 1
        for file, reader in enumerate(self._readers):
            reader.ahead(self._offsets[samples[files == file]])

    def _one_by_one(self, samples: npt.NDArray[np.int64]) -> tuple[Labels, list[memoryview]]:
        images = [self.image(sample)[1] for sample in samples.tolist()]  # of the labels of the table, or it raises
        return self._labels[samples], images

    def _file(self, sample: int) -> int:
        return bisect_right(self._starts, sample) - 1

    def _read(self, sample: int) -> tuple[int, memoryview]:
        if not 0 <= sample < len(self._offsets):
            raise IndexError(f"sample {sample}: expected 0 to {len(self._offsets) - 1}")
        try:
            header, image = unpack(self._readers[self._file(sample)].read_at(int(self._offsets[sample])))
            label = class_of(header.labels, pair=self._pair)
            if not len(image):
                raise HeaderError("an image behind the header", "none")
            if label >= self._properties.num_classes:
                raise HeaderError(f"a class number from 0 to {self._properties.num_classes - 1}", f"label {label}")
        except HeaderError as error:
            raise self._error(sample, error.expected, error.found, "correct property, or pack the set again") from None
        return label, image

    def _error(self, sample: int, expected: str, found: str, action: str) -> RecordError:
        path, offset = self._readers[self._file(sample)].path, int(self._offsets[sample])
        return RecordError(path, offset, expected, f"{found} in key {self._keys[sample]}", action)
