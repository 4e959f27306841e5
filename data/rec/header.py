"""The 24 bytes before each image in a record, `IRHeader`: flag, label, id, id2, and labels behind them.

flag 0: the label is the float32 in the header. flag n > 0: n float32 labels follow the header, the one in it is 0.
An identity header is a record without an image whose two labels are the half-open range of keys of its images.
float32 counts exactly to 2^24 only, so a class number above that is stored as two labels, see `class_labels`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from data.errors import DataError

HEADER = struct.Struct("<IfQQ")
EXACT = 1 << 24
"""float32 holds every integer up to here, and not the next one."""


class HeaderError(DataError):
    """The bytes of a payload are not a header and its labels; `expected` and `found` for whoever knows the file."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[type[HeaderError], tuple[str, str]]:
        return HeaderError, (self.expected, self.found)


class Header(NamedTuple):
    """flag: number of labels behind the header, 0 for one inside it. labels: float32 values. id, id2: any integers."""

    flag: int
    labels: tuple[float, ...]
    id: int
    id2: int


def pack(header: Header, image: bytes) -> bytes:
    """Payload of a record: header, labels, encoded image (b"" for an identity header).

    Raises HeaderError when the number of labels is not what flag says.
    """
    if len(header.labels) != max(header.flag, 1):
        raise HeaderError(f"{max(header.flag, 1)} labels for flag {header.flag}", f"{len(header.labels)}")
    inside = 0.0 if header.flag else header.labels[0]
    behind = header.labels if header.flag else ()
    return HEADER.pack(header.flag, inside, header.id, header.id2) + struct.pack(f"<{len(behind)}f", *behind) + image


def unpack(payload: memoryview) -> tuple[Header, memoryview]:
    """(header, encoded image), the image a view of the payload. Raises HeaderError when the payload is too short."""
    if len(payload) < HEADER.size:
        raise HeaderError(f"a header of {HEADER.size} bytes", f"a payload of {len(payload)}")
    flag, label, id_, id2 = HEADER.unpack_from(payload)
    if flag == 0:
        return Header(0, (label,), id_, id2), payload[HEADER.size :]
    end = HEADER.size + 4 * flag
    if len(payload) < end:
        raise HeaderError(f"{flag} labels behind the header", f"{len(payload) - HEADER.size} bytes")
    return Header(flag, struct.unpack_from(f"<{flag}f", payload, HEADER.size), id_, id2), payload[end:]


def class_labels(label: int, *, pair: bool) -> tuple[float, ...]:
    """The float32 labels that store a class number: itself, or as a pair (label div 2^24, label mod 2^24).

    Both floats of a pair are exact for class numbers below 2^48. A set uses pairs for all of its images or for
    none; the line `labels,hi,lo` in its `property` says so. This is our convention: peers have none above 2^24.
    """
    return (float(label // EXACT), float(label % EXACT)) if pair else (float(label),)


def class_of(labels: Sequence[float], *, pair: bool) -> int:
    """The class number that `class_labels` stored; further labels (landmarks) are ignored.

    Raises HeaderError for anything but whole numbers from 0 to 2^24 - 1: at 2^24 rounding begins.
    """
    used = tuple(labels[:2] if pair else labels[:1])
    if len(used) < 2 and pair:
        raise HeaderError("a class as two labels (hi, lo)", f"{len(labels)} labels")
    if not all(0 <= value < EXACT and value == int(value) for value in used):  # NaN fails the first comparison
        raise HeaderError("a class number from 0 to 2^24 - 1", "label " + ", ".join(f"{value:g}" for value in used))
    return int(used[0]) * EXACT + int(used[1]) if pair else int(used[0])
