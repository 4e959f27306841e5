"""Is a set what it says: every record's structure, header, label and image, the indexes, and how they fit each other.

Opening a set stops at the first contradiction and never decodes; this looks at all of it and lists all that it finds.

Legend: N images of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.checking.checksums import NAME as HASHES
from data.checking.checksums import Hasher, Hashes
from data.checking.findings import Finding, Findings, Verified
from data.checking.verify_file import LookedAt, check_ranges, look_at
from data.errors import DataError
from data.loading.decode import DecodeError, check_image, declared_size
from data.loading.prefetch import prefetch
from data.making.rewrite import names_of
from data.rec.header import unpack
from data.rec.places import Folder, index_of, record_files
from data.rec.properties import Properties, read_properties
from data.rec.record_files import find_out
from data.rec.recordio import RecordReader

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

    Raises DataError when there is no record file, or one cannot be read.
    """
    findings, place = Findings(), Folder(folder)
    names = record_files(place)
    there = set(place.names)
    with ExitStack() as stack:
        readers = []
        for name in names:
            readers.append(RecordReader(folder / name))
            stack.callback(readers[-1].close)
        properties = _properties(folder, findings)
        _lost(there, names, findings)
        files = _look(readers, properties, there, progress, findings)
        if properties is not None:
            _together(place, files, properties, findings)
        size = _size(files) if properties is None else properties.image_size
        hashes = _hashes(folder, findings)
        good, hashed = _decode(files, size, hashes, threads, progress, findings)
        if hashes is not None:
            _compare(hashes, hashed, threads, findings)
    count = [int(np.count_nonzero(good_N)) for good_N in good]
    return Verified(
        folder=str(folder),
        record_files=names,
        without_index=[name for name in names if index_of(name) not in there],
        bytes=sum(reader.size for reader in readers),
        images=sum(len(good_N) for good_N in good),
        identity_headers=sum(file.identities for file in files),
        labels=len(np.unique(np.concatenate([file.label_N for file in files]))),
        findings=findings,
        good=(
            np.concatenate([file.label_N[good_N] for file, good_N in zip(files, good, strict=True)]),
            np.repeat(np.arange(len(files)), count),
            np.concatenate([file.offset_N[good_N] for file, good_N in zip(files, good, strict=True)]),
        ),
        properties=properties,
        size=size,
    )


def _properties(folder: Path, findings: Findings) -> Properties | None:
    properties = None
    try:
        properties = read_properties(folder / "property")
        names_of(folder, properties.num_classes)
    except DataError as error:
        findings.add(Finding.of_error("property", error, folder))
    return properties


def _lost(there: set[str], names: Sequence[str], findings: Findings) -> None:
    """Of several files one may be missing, and opening would not know: its index may still be there."""
    if names == ["train.rec"]:
        return
    start = "train" if names[0].startswith("train") else ""
    indexes = {name for name in there if name.startswith(start) and name.endswith(".idx") and not name.startswith(".")}
    for name in sorted(indexes - {index_of(name) for name in names}):
        what = f"expected {name.removesuffix('.idx')}.rec beside it, found none: copy it again, or remove its index"
        findings.add(Finding(kind="index", file=name, what=what))


def _look(
    readers: Sequence[RecordReader],
    properties: Properties | None,
    there: set[str],
    progress: Progress,
    findings: Findings,
) -> list[LookedAt]:
    files: list[LookedAt] = []
    done, total = 0, sum(reader.size for reader in readers)
    for reader in readers:
        start = done

        def reach(offset: int, start: int = start) -> None:
            progress("records", start + offset, total)

        indexed = index_of(reader.path.name) in there
        files.append(look_at(reader, properties, findings, indexed=indexed, progress=reach))
        done += reader.size
    return files


def _together(place: Folder, files: Sequence[LookedAt], properties: Properties, findings: Findings) -> None:
    """Identity headers against labels in each file that is sound; if all are, what opening the set looks at: as many
    classes as property says, in all files together.
    """
    sound = not findings
    fit = [check_ranges(file, findings) for file in files if file.sound]
    if sound and all(fit):
        try:
            find_out(place, [file.name for file in files], [file.reader for file in files], properties)
        except DataError as error:
            findings.add(Finding.of_error("identity", error, Path(place.address)))


def _size(files: Sequence[LookedAt]) -> tuple[int, int] | None:
    """Of the first image that states one."""
    for file in files:
        for offset in file.offset_N.tolist():
            try:
                return declared_size(unpack(file.reader.read_at(offset))[1])
            except DecodeError:
                continue
    return None


def _decode(
    files: Sequence[LookedAt],
    size: tuple[int, int] | None,
    hashes: Hashes | None,
    threads: int,
    progress: Progress,
    findings: Findings,
) -> tuple[list[npt.NDArray[np.bool_]], dict[str, dict[str, Any]]]:
    """Which images of each file decode, and the hashes of each file that `hashes` names; of the other images is told
    why not.
    """
    good, hashed = [], {}
    done, total = 0, sum(len(file.offset_N) for file in files)
    for file in files:
        hasher = Hasher(file.reader.view, hashes.block) if hashes is not None and file.name in hashes.names else None
        good_N = np.ones(len(file.offset_N), np.bool_)
        for chunk in _decoded(file, size, threads, hasher):
            progress("images", done + min(chunk.start + _AT_ONCE, len(good_N)), total)
            for number, reason in sorted(chunk.bad.items()):
                good_N[number] = False
                findings.add(file.finding("image", number, reason))
        good.append(good_N)
        done += len(good_N)
        if hasher is not None:
            hashed[file.name] = hasher.finish()
    return good, hashed


def _decoded(file: LookedAt, size: tuple[int, int] | None, threads: int, hasher: Hasher | None) -> Iterator[_Chunk]:
    """hasher: is led along the file, ahead of the images."""
    count = len(file.offset_N)

    def look(chunk: _Chunk, part: range) -> None:
        for number in range(chunk.start + part.start, min(chunk.start + part.stop, count)):
            try:
                check_image(unpack(file.reader.read_at(int(file.offset_N[number])))[1], size or (0, 0))
            except DecodeError as error:
                chunk.bad[number] = str(error)

    def chunks() -> Iterator[_Chunk]:
        for start in range(0, count, _AT_ONCE):
            if hasher is not None:
                hasher.reach(int(file.offset_N[min(start + _AT_ONCE, count) - 1]))
            yield _Chunk(start)

    return prefetch(chunks(), look, rows=_AT_ONCE, threads=threads, ahead=4 * threads)


def _hashes(folder: Path, findings: Findings) -> Hashes | None:
    """None where there are none, or what is there cannot be used, which is a finding."""
    if not (folder / HASHES).exists():
        return None
    try:
        return Hashes(folder)
    except DataError as error:
        findings.add(Finding.of_error("hash", error, folder))
        return None


def _compare(hashes: Hashes, hashed: dict[str, dict[str, Any]], threads: int, findings: Findings) -> None:
    """Every file of `hashes.json`, and record files that it lacks. hashed: of the record files."""
    faults = hashes.unnamed()
    for name in hashes.names:
        try:
            faults += (
                hashes.compare(name, hashed[name])
                if name in hashed
                else hashes.check(name, threads=threads, progress=lambda _: None)
            )
        except DataError as error:
            findings.add(Finding.of_error("hash", error, hashes.folder))
    for fault in faults:
        what = f"{fault.what}: {HASHES} says otherwise" if fault.what == "changed" else fault.what
        findings.add(Finding(kind="hash", file=fault.file, offset=fault.begin, end=fault.end, what=what))
