"""Is a set what it says: every record's structure, header, label and image, the index, and how they fit each other.

Opening a set stops at the first contradiction and never decodes; this looks at all of it and lists all that it finds.

Legend: N images, R records.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.checksums import NAME as HASHES
from data.checksums import Fault, Hasher, Hashes
from data.decode import DecodeError, check_image, declared_size
from data.errors import DataError
from data.findings import Finding, Findings, Ints, Verified
from data.header import HeaderError, class_of, unpack
from data.index import Index, read_index
from data.layout import find_layout, labels_of_ranges
from data.prefetch import prefetch
from data.properties import Properties, read_properties
from data.recordio import RecordReader
from data.records import RecordSet
from data.rewrite import names_of
from data.salvage import Damage, salvage

Progress = Callable[[str, int, int], None]
"""What is being done, how far it is, how far it goes."""

_AT_ONCE = 256
"""Images that a thread takes: some 20 ms."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Images that are decoded together, and why some of them are not."""

    start: int
    bad: dict[int, str] = field(default_factory=dict)


def verify(folder: Path, *, threads: int, progress: Progress) -> Verified:
    """Look at everything, by `hashes.json` too where there is one.

    Raises DataError when there is no record file, or it cannot be read.
    """
    findings = Findings()
    reader = RecordReader(folder / "train.rec")
    try:
        properties = _properties(folder / "property", findings)
        _names(folder, properties, findings)
        offset_R = _records(reader, progress, findings)
        index = _index(folder / "train.idx", reader, offset_R, findings)
        key_R = _keys_at(offset_R, index)
        images, identities = _headers(reader, offset_R, key_R, properties, findings)
        if index is not None and not findings:
            _identities(folder, index, reader, images, findings)
        size = _size(reader, images.offset_N) if properties is None else properties.image_size
        hashes = _hashes(folder, findings)
        hasher = Hasher(reader.view, hashes.block) if hashes is not None and reader.path.name in hashes.names else None
        good_N = _decode(reader, images, size, threads, progress, findings, hasher)
        if hashes is not None:
            _compare(hashes, hasher, threads, findings)
        return Verified(
            folder=str(folder),
            bytes=reader.size,
            images=len(good_N),
            identity_headers=identities,
            labels=len(np.unique(images.label_N)),
            findings=findings,
            good=(images.label_N[good_N], images.offset_N[good_N]),
            properties=properties,
            size=size,
        )
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class _Images:
    offset_N: Ints
    key_N: Ints
    """-1: the index has none, or there is no index."""
    label_N: Ints


def _properties(path: Path, findings: Findings) -> Properties | None:
    try:
        return read_properties(path)
    except DataError as error:
        findings.add(Finding(kind="property", file=path.name, what=_without(error, path)))
        return None


def _names(folder: Path, properties: Properties | None, findings: Findings) -> None:
    if properties is not None:
        try:
            names_of(folder, properties.num_classes)
        except DataError as error:
            path = folder / "identities.txt"
            findings.add(Finding(kind="property", file=path.name, what=_without(error, path)))


def _without(error: DataError, path: Path) -> str:
    return str(error).replace(f"{path}: ", "").replace(f"{path.parent}{os.sep}", "")


def _records(reader: RecordReader, progress: Progress, findings: Findings) -> Ints:
    """Offsets of the whole records, rising."""
    offsets = array("q")
    for found in salvage(reader, lambda offset: progress("records", offset, reader.size)):
        if isinstance(found, Damage):
            what = f"{found.what}; {found.end - found.offset} bytes up to byte {found.end} are lost"
            findings.add(Finding(kind="structure", offset=found.offset, what=what))
        else:
            offsets.append(found)
    return np.array(offsets, np.int64)


def _index(path: Path, reader: RecordReader, offset_R: Ints, findings: Findings) -> Index | None:
    """None where it cannot be read; records that it does not list, and the other way round, are found."""
    try:
        index = read_index(path, reader)
    except DataError as error:
        findings.add(Finding(kind="index", file=path.name, what=_without(error, path)))
        return None
    for number in np.flatnonzero(~np.isin(index.offsets, offset_R)).tolist():
        key, offset = int(index.keys[number]), int(index.offsets[number])
        findings.add(Finding(kind="index", file=path.name, offset=offset, key=key, what="no record begins there"))
    for offset in offset_R[~np.isin(offset_R, index.offsets)].tolist():
        findings.add(Finding(kind="index", offset=offset, what="the index does not list this record"))
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
) -> tuple[_Images, int]:
    """Images whose header is well, and how many identity headers there are."""
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
            findings.add(Finding(kind="header", offset=offset, key=listed, label=label, what=wrong))
            continue
        for values, value in ((offsets, offset), (keys, key), (labels, label)):
            values.append(value)
    return _Images(*(np.array(values, np.int64) for values in (offsets, keys, labels))), identities


def _identities(folder: Path, index: Index, reader: RecordReader, images: _Images, findings: Findings) -> None:
    """Ranges of keys against labels, counts against property: where all else fits."""
    try:
        RecordSet.open(folder).close()
        layout = find_layout(folder / "train.idx", index, reader)
        by_ranges = labels_of_ranges(layout, reader)
    except DataError as error:
        findings.add(Finding(kind="identity", what=_without(error, folder / "train.rec")))
        return
    if by_ranges is None or not by_ranges[1].all():
        return
    range_N = by_ranges[0]
    label_N = images.label_N  # both in file order
    if len(range_N) != len(label_N):
        what = f"expected images at {len(range_N)} keys, found {len(label_N)} with a class and bytes behind the header"
        findings.add(Finding(kind="identity", what=what))
        return
    # Headers need not stand in the order of the classes: each speaks for the class that most of its images have.
    pairs, count = np.unique(np.stack([range_N, label_N]), axis=1, return_counts=True)
    order = np.lexsort((-count, pairs[0]))
    first = order[np.unique(pairs[0][order], return_index=True)[1]]
    class_of_range = np.full(range_N.max() + 1, -1, np.int64)
    class_of_range[pairs[0][first]] = pairs[1][first]
    for number in np.flatnonzero(class_of_range[range_N] != label_N).tolist():
        what = f"its identity header's other images have label {class_of_range[range_N[number]]}"
        offset, key, label = (int(values[number]) for values in (images.offset_N, images.key_N, images.label_N))
        findings.add(Finding(kind="identity", offset=offset, key=key, label=label, what=what))


def _size(reader: RecordReader, offset_N: Ints) -> tuple[int, int] | None:
    """Of the first image that states one."""
    for offset in offset_N.tolist():
        try:
            return declared_size(unpack(reader.read_at(offset))[1])
        except DecodeError:
            continue
    return None


def _decode(
    reader: RecordReader,
    images: _Images,
    size: tuple[int, int] | None,
    threads: int,
    progress: Progress,
    findings: Findings,
    hasher: Hasher | None,
) -> npt.NDArray[np.bool_]:
    """Which images decode; of the others is told why not. hasher: is led along the file, ahead of the images."""
    count = len(images.offset_N)
    good_N = np.ones(count, np.bool_)

    def look(chunk: _Chunk, part: range) -> None:
        for number in range(chunk.start + part.start, min(chunk.start + part.stop, count)):
            try:
                check_image(unpack(reader.read_at(int(images.offset_N[number])))[1], size or (0, 0))
            except DecodeError as error:
                chunk.bad[number] = str(error)

    def chunks() -> Iterator[_Chunk]:
        for start in range(0, count, _AT_ONCE):
            if hasher is not None:
                hasher.reach(int(images.offset_N[min(start + _AT_ONCE, count) - 1]))
            yield _Chunk(start)

    for chunk in prefetch(chunks(), look, rows=_AT_ONCE, threads=threads, ahead=4 * threads):
        progress("images", min(chunk.start + _AT_ONCE, count), count)
        for number, reason in sorted(chunk.bad.items()):
            good_N[number] = False
            key, offset, label = (int(values[number]) for values in (images.key_N, images.offset_N, images.label_N))
            listed = None if key < 0 else key
            findings.add(Finding(kind="image", offset=offset, key=listed, label=label, what=reason))
    return good_N


def _hashes(folder: Path, findings: Findings) -> Hashes | None:
    """None where there are none, or what is there cannot be used, which is a finding."""
    path = folder / HASHES
    if not path.exists():
        return None
    try:
        return Hashes(folder)
    except DataError as error:
        findings.add(Finding(kind="hash", file=path.name, what=_without(error, path)))
        return None


def _compare(hashes: Hashes, hasher: Hasher | None, threads: int, findings: Findings) -> None:
    """Every file of `hashes.json`; the records by `hasher`, which has nearly all of them."""
    for name in hashes.names:
        try:
            faults: list[Fault] = (
                hashes.check(name, threads=threads, progress=lambda _: None)
                if hasher is None or name != "train.rec"
                else hashes.compare(name, hasher.finish())
            )
        except DataError as error:
            faults = [Fault(file=HASHES, what=_without(error, hashes.folder / HASHES))]
        for fault in faults:
            what = f"{fault.what}: {HASHES} says otherwise" if fault.what == "changed" else fault.what
            findings.add(Finding(kind="hash", file=fault.file, offset=fault.begin, end=fault.end, what=what))
