"""What `verify` looks at in each record file: structure, index and headers, and how they fit each other.

Legend: N images, R records.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.checking.findings import Finding, Findings, Ints
from data.checking.salvage import Damage, salvage
from data.errors import DataError
from data.rec.header import HeaderError, class_of, unpack
from data.rec.index import Index, read_index, rebuild
from data.rec.layout import find_layout, labels_of_ranges
from data.rec.places import index_of
from data.rec.properties import Properties
from data.rec.recordio import RecordReader


@dataclass(frozen=True, slots=True)
class LookedAt:
    """A record file, and its images whose header is well."""

    reader: RecordReader
    index: Index | None
    """None: there is none, or it cannot be read."""
    offset_N: Ints
    key_N: Ints
    """-1: the index has none, or there is no index."""
    label_N: Ints
    identities: int
    """Identity headers, and key 0."""
    sound: bool
    """Whether nothing was found."""

    @property
    def name(self) -> str:
        return self.reader.path.name

    def finding(self, kind: str, number: int, what: str) -> Finding:
        """About an image."""
        offset, key, label = (int(values[number]) for values in (self.offset_N, self.key_N, self.label_N))
        return Finding(kind=kind, file=self.name, offset=offset, key=None if key < 0 else key, label=label, what=what)


def look_at(
    reader: RecordReader,
    properties: Properties | None,
    findings: Findings,
    *,
    indexed: bool,
    progress: Callable[[int], None],
) -> LookedAt:
    """From front to back. indexed: whether an index lies beside it. progress: called with the byte offset reached."""
    before = len(findings)
    offset_R = _records(reader, progress, findings)
    index = _index(reader, offset_R, findings) if indexed else None
    images, identities = _headers(reader, offset_R, _keys_at(offset_R, index), properties, findings)
    return LookedAt(reader, index, *images, identities, sound=len(findings) == before)


def check_ranges(file: LookedAt, findings: Findings) -> bool:
    """Ranges of keys against labels, in a file that is sound; False where the two cannot be told apart."""
    if not file.identities:
        return True
    folder, path = file.reader.path.parent, file.reader.path
    try:
        if file.index is None:
            index = rebuild(file.reader).index
        else:
            index, path = file.index, folder / index_of(file.name)
        by_ranges = labels_of_ranges(find_layout(path, index, file.reader), file.reader)
    except DataError as error:
        findings.add(Finding.of_error("identity", error, folder))
        return False
    if by_ranges is None or not by_ranges[1].all():
        return True
    range_N, label_N = by_ranges[0], file.label_N  # both in file order
    if len(range_N) != len(label_N):
        what = f"expected images at {len(range_N)} keys, found {len(label_N)} with a class and bytes behind the header"
        findings.add(Finding(kind="identity", file=file.name, what=what))
        return False
    # Headers need not stand in the order of the classes: each speaks for the class that most of its images have.
    pairs, count = np.unique(np.stack([range_N, label_N]), axis=1, return_counts=True)
    order = np.lexsort((-count, pairs[0]))
    first = order[np.unique(pairs[0][order], return_index=True)[1]]
    class_of_range = np.full(range_N.max() + 1, -1, np.int64)
    class_of_range[pairs[0][first]] = pairs[1][first]
    for number in np.flatnonzero(class_of_range[range_N] != label_N).tolist():
        what = f"its identity header's other images have label {class_of_range[range_N[number]]}"
        findings.add(file.finding("identity", number, what))
    return True


def _records(reader: RecordReader, progress: Callable[[int], None], findings: Findings) -> Ints:
    """Offsets of the whole records, rising."""
    offsets = array("q")
    for found in salvage(reader, progress):
        if isinstance(found, Damage):
            what = f"{found.what}; {found.end - found.offset} bytes up to byte {found.end} are lost"
            findings.add(Finding(kind="structure", file=reader.path.name, offset=found.offset, what=what))
        else:
            offsets.append(found)
    return np.array(offsets, np.int64)


def _index(reader: RecordReader, offset_R: Ints, findings: Findings) -> Index | None:
    """None where it cannot be read; records that it does not list, and the other way round, are found."""
    path: Path = reader.path.parent / index_of(reader.path.name)
    try:
        index = read_index(path, reader)
    except DataError as error:
        findings.add(replace(Finding.of_error("index", error, path.parent), file=path.name))
        return None
    for number in np.flatnonzero(~np.isin(index.offsets, offset_R)).tolist():
        key, offset = int(index.keys[number]), int(index.offsets[number])
        findings.add(Finding(kind="index", file=path.name, offset=offset, key=key, what="no record begins there"))
    for offset in offset_R[~np.isin(offset_R, index.offsets)].tolist():
        what = "the index does not list this record"
        findings.add(Finding(kind="index", file=reader.path.name, offset=offset, what=what))
    return index


def _keys_at(offset_R: Ints, index: Index | None) -> Ints:
    key_R = np.full(len(offset_R), -1, np.int64)
    if index is not None and len(index.offsets):
        at_R = np.searchsorted(index.offsets, offset_R).clip(max=len(index.offsets) - 1)
        listed_R = index.offsets[at_R] == offset_R
        key_R[listed_R] = index.keys[at_R[listed_R]]
    return key_R


def _headers(
    reader: RecordReader, offset_R: Ints, key_R: Ints, properties: Properties | None, findings: Findings
) -> tuple[tuple[Ints, Ints, Ints], int]:
    """Offsets, keys and labels of the images whose header is well, and how many identity headers there are."""
    offsets, keys, labels, identities = array("q"), array("q"), array("q"), 0
    for offset, key in zip(offset_R.tolist(), key_R.tolist(), strict=True):
        label, wrong = None, ""
        try:
            header, image = unpack(reader.read_at(offset))
            if header.flag == 2 and not len(image):
                identities += 1
                continue
            label = class_of(header.labels, pair=bool(properties and properties.pair))
            if not len(image):
                wrong = "expected an image behind the header, found none"
            elif properties is not None and label >= properties.num_classes:
                wrong = f"expected a class from 0 to {properties.num_classes - 1}, as property says"
        except HeaderError as error:
            wrong = str(error)
        if label is None or wrong:
            listed = None if key < 0 else key
            name = reader.path.name
            findings.add(Finding(kind="header", file=name, offset=offset, key=listed, label=label, what=wrong))
            continue
        for values, value in ((offsets, offset), (keys, key), (labels, label)):
            values.append(value)
    return (np.array(offsets, np.int64), np.array(keys, np.int64), np.array(labels, np.int64)), identities
