"""Index of a record file (`train.idx`): a line `key<TAB>offset` for each record; read, written, rebuilt by a scan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import appearing
from data.rec.digits import pairs_of
from data.rec.header import EXACT, HeaderError
from data.rec.heads import Heads, read_heads
from data.rec.recordio import HEAD, CutError, RecordError, Records, cut_action, rebuild_action

Keys = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Offsets = npt.NDArray[np.int64]


class Index(NamedTuple):
    """keys: int32 (n,), or int64 where one needs it; offsets: int64 (n,), rising."""

    keys: Keys
    offsets: Offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """What a scan made of a record file. cut: why the scan ended before the end of the file, or ""."""

    index: Index
    images: int
    identities: int
    cut: str


def read_index(path: Path, reader: Records) -> Index:
    """Read the index of an open record file: 42 million lines in 1.3 s (benchmarks/results), 12 bytes of memory a line.

    Raises DataError, naming the command that rebuilds the index, when it is missing, has lines that are not two
    whole numbers, the same key or offset twice, or offsets where the record file can have no record.
    """
    action = rebuild_action(reader.path)
    keys: Keys
    try:
        keys, offsets = pairs_of(path) or _plain_pairs_of(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing: {action}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: expected lines `key<TAB>offset`: {error} ({action})") from None
    if not len(keys):
        raise DataError(f"{path}: expected lines `key<TAB>offset`, found none ({action})")
    if not _rises(offsets):
        order = np.argsort(offsets, kind="stable")
        keys, offsets = keys[order], offsets[order]
    # Key 0 stands last in insightface's layout, and all others in their order.
    by_key: Keys = keys[:-1] if keys[-1] == 0 and (len(keys) == 1 or keys[0] > 0) else keys
    if not _rises(by_key):
        by_key = by_key.copy()
        by_key.sort()
    for values, name in ((offsets, "offset"), (by_key, "key")):
        if not _rises(values):
            twice = values[:-1][values[1:] == values[:-1]][0]
            raise DataError(f"{path}: {name} {twice} stands there twice ({action})")
        if len(values) and values[0] < 0:
            raise DataError(f"{path}: expected {name}s from 0 on, found {values[0]} ({action})")
    unaligned = offsets.astype(np.uint8) & 3 != 0
    if unaligned.any():
        reader.read_at(int(offsets[np.argmax(unaligned)]))  # says what is wrong with it
    if offsets[-1] > reader.size - HEAD.size:
        reader.read_at(int(offsets[np.searchsorted(offsets, reader.size - HEAD.size, side="right")]))
    return Index(keys, offsets)


def _rises(values: Keys) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _plain_pairs_of(path: Path) -> tuple[Offsets, Offsets]:
    """What `pairs_of` gives, of any text that has it. Raises ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an empty file: the caller says more
        table: Offsets = np.loadtxt(path, np.int64, delimiter="\t", ndmin=2, comments=None, encoding="latin-1")
    if not len(table):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if table.shape[1] != 2:
        raise ValueError(f"found {table.shape[1]} columns")
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def write_index(path: Path, index: Index) -> None:
    """Write the lines in the order of `index`; the file appears whole or not at all. Raises DataError."""
    with appearing([path]) as (partial,), partial.open("w", encoding="ascii") as file:
        file.writelines(f"{key}\t{offset}\n" for key, offset in zip(index.keys, index.offsets, strict=True))


def rebuild(
    reader: Records, *, images_only: bool = False, progress: Callable[[int], None] = lambda offset: None
) -> Rebuilt:
    """Find the records by a scan and number them as the builders do.

    With identity headers behind the images (insightface): keys 1, 2, … in file order but for key 0, the record behind
    all of the headers or, as face2rec2 writes it, before them. Without any: keys 0, 1, …. images_only: leave identity
    headers out and end at a cut instead of raising. progress: called now and then with the byte offset reached.

    Raises RecordError when the file is damaged, or cut and not images_only.
    """
    found: list[int] = []
    cut = ""
    try:
        for number, (offset, _) in enumerate(reader.scan()):
            found.append(offset)
            if number % 4096 == 0:
                progress(offset)
    except CutError as error:
        if not images_only:
            raise
        cut = f"cut at byte {error.offset} of {reader.size}"
    if not found:
        raise RecordError(reader.path, 0, "records", cut or "an empty file", "pack the set again")
    offsets = np.array(found, np.int64)
    heads = read_heads(reader, offsets)
    if heads.is_identity.all():
        raise RecordError(reader.path, 0, "images", "identity headers only", "pack the set again")
    identities = int(heads.is_identity.sum())
    if images_only or not identities:
        offsets = offsets[~heads.is_identity]
        index = Index(np.arange(len(offsets), dtype=np.int64), offsets)
        return Rebuilt(index=index, images=len(offsets), identities=0, cut=cut)
    images = len(offsets) - identities
    at = _key_0(reader, offsets, heads)
    keys = np.insert(np.arange(1, len(offsets), dtype=np.int64), at, 0)
    return Rebuilt(index=Index(keys, offsets), images=images, identities=identities - 1, cut=cut)


def _key_0(reader: Records, offsets: npt.NDArray[np.int64], heads: Heads) -> int:
    """Which record is key 0, that says where the identity headers, all of them behind the images, lie: the last one,
    or the first behind the images. Raises RecordError when neither does.
    """
    images, last = int(np.argmax(heads.is_identity)), len(offsets) - 1
    # Key 0 stores its range in float32: compare what float32 makes of the true one.
    expected = np.array([images + 1, len(offsets)], np.float32)
    if heads.is_identity[images:].all():
        for at in (last, images):
            if np.array_equal(heads.labels[at], expected):
                return at
    at, (start, end) = images, heads.labels[images].tolist()
    if start == expected[0] < end:  # of no identity: none has images from there on
        wanted = f"{end - start:.0f} identity headers behind the images, as key 0 at their start states"
        found = f"{last - images} records"
    else:
        at, (start, end) = last, heads.labels[last].tolist()
        wanted = f"the record of key 0 with the range {images + 1}, {len(offsets)} behind all identity headers"
        found = f"a record with the labels {start:.0f}, {end:.0f}"
    raise RecordError(reader.path, int(offsets[at]), wanted, found, cut_action(reader.path))


def find_identities(reader: Records, by_key: Offsets, key_0: tuple[float, float]) -> int:
    """First key of the identity headers, of the offsets by_key (n,) of the keys from 1 on and the range that key 0
    states; they end with the keys.

    Above 2^24 float32 rounds that range, so the true start is looked for within the rounding.
    Raises HeaderError when the range does not agree with the index, RecordError when the file is damaged there.
    """
    stated, end = key_0
    count = len(by_key) + 1
    if not 2 <= stated < end or float(np.float32(count)) != end:
        raise HeaderError(
            "as many keys as key 0 states", f"{count} keys and identity headers from {stated:.0f} to {end:.0f}"
        )
    reach = 1 if stated < EXACT else int(np.spacing(np.float32(stated)))
    first = max(int(stated) - reach, 1)
    is_identity = read_heads(reader, by_key[first - 1 : int(stated) + reach - 1]).is_identity
    start = first + int(np.argmax(is_identity))
    if not is_identity[start - first :].all() or is_identity[0] or float(np.float32(start)) != stated:
        raise HeaderError(f"the first identity header at key {stated:.0f}, as key 0 states", "another kind of record")
    return start
