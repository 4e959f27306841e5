"""What `verify` finds in a set, as lines for people and JSON for machines."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.rec.places import natural
from data.rec.properties import Properties
from data.rec.recordio import RecordError

Ints = npt.NDArray[np.int64]
KINDS = {
    "property": "property and identities.txt",
    "structure": "bytes that are no record",
    "index": "the index against the records",
    "header": "headers and labels",
    "identity": "identity headers against the images",
    "image": "images that do not decode",
    "hash": "hashes.json against the files",
}
"""Kinds of findings, in the order in which they are told."""
MOST = 10_000
"""Findings of a kind that are kept: the index of another set would give one for each of its records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    kind: str
    what: str
    file: str
    offset: int | None = None
    """Of the record, in bytes; of a hash, where the bytes begin that are not the same."""
    end: int | None = None
    """Of a hash: where they end."""
    key: int | None = None
    """By the index."""
    label: int | None = None

    def line(self) -> str:
        bytes_ = f"byte {self.offset}" if self.end is None else f"bytes {self.offset} … {self.end}"
        where = [bytes_] if self.offset is not None else []
        where += [f"key {self.key}"] if self.key is not None else []
        where += [f"label {self.label}"] if self.label is not None else []
        return f"{self.kind}: {self.file}{''.join(f', {part}' for part in where)}: {self.what}"

    @classmethod
    def of_error(cls, kind: str, error: DataError, folder: Path) -> Finding:
        """What an error about a file of the set says: `<folder>/<file>: …`."""
        file, _, what = str(error).replace(f"{folder}{os.sep}", "").partition(": ")
        if isinstance(error, RecordError):
            return cls(kind=kind, file=file, offset=error.offset, what=what.removeprefix(f"byte {error.offset}: "))
        return cls(kind=kind, file=file, what=what)


class Findings:
    """All that was found: every one counted, the first MOST of each kind kept."""

    def __init__(self) -> None:
        self._kept: list[Finding] = []
        self._counted: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counted.total()

    def add(self, finding: Finding) -> None:
        self._counted[finding.kind] += 1
        if self._counted[finding.kind] <= MOST:
            self._kept.append(finding)

    @property
    def counts(self) -> dict[str, int]:
        """Of each kind that there is."""
        return {kind: self._counted[kind] for kind in KINDS if self._counted[kind]}

    def listed(self) -> list[Finding]:
        """Those kept, by kind and place: of a record file and its index together, in the order of the set."""
        order = list(KINDS)

        def place(finding: Finding) -> tuple[int, list[tuple[int, str]], int]:
            return order.index(finding.kind), natural(f"{Path(finding.file).stem}.rec"), finding.offset or 0

        return sorted(self._kept, key=place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was looked at, and what was found."""

    folder: str
    record_files: list[str]
    """In the order of the set."""
    without_index: list[str]
    """Those that are scanned when the set is opened."""
    bytes: int
    images: int
    """Records with an image and a class, whether it decodes or not."""
    identity_headers: int
    labels: int
    """Distinct ones."""
    findings: Findings
    good: tuple[Ints, Ints, Ints]
    """Labels, numbers of the record files and offsets of the images that are well, in the order of the set."""
    properties: Properties | None
    size: tuple[int, int] | None
    """Of the images, (height, width): by property, or of the first image; None: there is none."""

    def as_json(self) -> dict[str, Any]:
        """For machines: all but the good images."""
        names = ("folder", "record_files", "without_index", "bytes", "images", "identity_headers", "labels")
        numbers = {name: getattr(self, name) for name in names}
        listed = [{k: v for k, v in asdict(finding).items() if v is not None} for finding in self.findings.listed()]
        counts = self.findings.counts
        return {**numbers, "ok": not counts, "counts": counts, "findings": listed}
