"""A training set: record files, their indexes and `property`, in each layout that the field packs, near or far."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.rec.layout import Labels
from data.rec.places import Place, index_of, is_address, local_file, place_of, record_files, where
from data.rec.properties import Properties, read_properties
from data.rec.record_files import SPREAD, find_out
from data.rec.recordio import Where
from data.rec.samples import Samples
from data.stores.block_disk import locked
from data.stores.cache import Cache, Table, keep_table, load_table, stamp, table_folder

_SPREAD_FAR = 16
"""Images looked at in a set that is far away: each costs a block."""
_LARGE = 1 << 33
"""Bytes of records from which on it pays that ranks open a set one after the other."""
_log = logging.getLogger(__name__)


class RecordSet:
    """Every image of a set, numbered 0 .. num_samples - 1 (the sample id) in file order, whatever the layout.

    layout "insightface": images at keys 1..N, then identity headers with the range of keys of each identity, and
    key 0, which says where these headers lie. layout "sequential": every record is an image. Several files
    (train_0.rec, train_1.rec, …) are one set, one behind the other, with the classes that their images name.

    Labels are float32 in the format. Key ranges are exact up to 2^24 and give the classes without a touch of the
    images; for images at higher keys their own headers are read instead, and ranges are only counted (by the index, in
    integers). Class numbers above 2^24 must be stored as pairs, see `data.rec.header.class_labels`.

    address: of the set; names, bytes: of its record files; num_classes, num_samples; image_size: (height, width);
    labels: int64 (num_samples,), the class of every sample, not to be written to. Threads may read at once; pickling
    keeps the address only.
    """

    def __init__(self, where: Where, place: Place, cache: Cache) -> None:
        """For `open`. Reads all that there is to know but the images."""
        self._where, self._place, self._cache = where, place, cache
        self.address = place.address
        names = self.names = record_files(place)
        if len(names) > 1:
            _log.info("%s: %d record files are one set: %s", place.address, len(names), ", ".join(names))
        if "property" not in place.names and self.far:
            raise DataError(f"{place.address}/property: missing: expected a first line `classes,height,width`")
        properties = read_properties(place.local("property"))
        self.num_classes = properties.num_classes
        self.image_size = properties.image_size
        self._readers = [place.records(name) for name in names]
        self.bytes = sum(reader.size for reader in self._readers)
        table, self._samples = self._find_out(names, properties)
        self.layout = table.layout
        self.labels: Labels = table.labels

    @classmethod
    def open(cls, folder: Where, cache: Cache | None = None) -> RecordSet:
        """Open and check a set. Raises DataError, one line, for anything missing, damaged or contradictory.

        folder: a path, or an address such as s3://bucket/folder. cache: where to keep what took long to find out, and
        blocks of what is far away; None: `Cache.default()`.
        """
        cache = Cache.default() if cache is None else cache
        folder = where(str(folder))
        return cls(folder, place_of(folder, cache), cache)

    def __reduce__(self) -> tuple[object, tuple[Where, Cache]]:
        return RecordSet.open, (self._where, self._cache)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.labels)

    def image(self, sample: int) -> tuple[int, memoryview]:
        """(label, encoded image), the image a view into the file where it can be.

        Raises RecordError when the record is damaged or has no image, or its label is none of this set's or not the
        one of its identity header; DataError when a store does not give it; IndexError when there is no such sample.
        """
        return self._samples.image(sample)

    def image_batch(self, samples: npt.NDArray[np.int64]) -> tuple[Labels, list[memoryview]]:
        """`image` of each of some samples (n,), in less time: int64 (n,) labels, n encoded images.

        Raises at the first that `image` raises at.
        """
        return self._samples.image_batch(samples)

    @property
    def far(self) -> bool:
        """Whether the set is in an object store."""
        return is_address(self._where)

    def ahead(self, samples: npt.NDArray[np.int64]) -> None:
        """Some samples are going to be read: of a set that is far away they are got meanwhile."""
        self._samples.ahead(samples)

    def has(self, name: str) -> bool:
        """Whether there is such a file beside the records."""
        return name in self._place.names

    def file(self, name: str) -> Path:
        """A file by its name beside the records, by its path or address: as a path, of a local copy where it is far.

        A local one need not be there. Raises DataError.
        """
        return (
            local_file(name, self._cache) if is_address(name) or Path(name).is_absolute() else self._place.local(name)
        )

    def close(self) -> None:
        """Unmap the files."""
        for reader in self._readers:
            reader.close()
        self._place.close()

    def _find_out(self, names: list[str], properties: Properties) -> tuple[Table, Samples]:
        """From the cache, if it has what these very files hold; else from the files."""
        there = set(self._place.names)
        files = [name for record in names for name in (record, index_of(record)) if name in there]
        facts = [*map(self._place.mark, files), properties.text()]
        folder = table_folder(self._cache, self.address, stamp(facts))
        if (known := self._known(folder, properties)) is not None:
            return known
        with self._one_rank(folder):
            if (known := self._known(folder, properties)) is not None:
                return known
            table, slow = find_out(self._place, names, self._readers, properties, spread=self._spread)
            if slow or self.far:
                keep_table(folder, table)
        return table, Samples(self._readers, table, properties)

    def _known(self, folder: Path, properties: Properties) -> tuple[Table, Samples] | None:
        if (table := load_table(folder)) is not None:
            samples = Samples(self._readers, table, properties)
            if samples.agree(self._spread):
                return table, samples
        return None

    @property
    def _spread(self) -> int:
        return _SPREAD_FAR if self.far else SPREAD

    @contextlib.contextmanager
    def _one_rank(self, folder: Path) -> Iterator[None]:
        """The ranks of a host one after the other, where looking takes long: the others find what one has kept."""
        with contextlib.ExitStack() as stack:
            if self.far or self.bytes > _LARGE:
                with contextlib.suppress(OSError):  # no cache: every rank for itself
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(folder.parent / ".lock"))
            yield
