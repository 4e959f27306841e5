"""Which records of a file are images, and the class of each: from identity headers where these tell, else by a scan."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.header import EXACT, HeaderError
from data.heads import Heads, read_heads
from data.index import Index, find_identities
from data.recordio import CutError, RecordError, RecordReader, cut_action, images_only_action, rebuild_action

Labels = npt.NDArray[np.int64]


class Layout(NamedTuple):
    """name: "insightface" or "sequential". images: keys and offsets of the images in file order.

    identities: int64 (C,), offsets of the identity headers in the order of their keys; empty when sequential.
    """

    name: str
    images: Index
    identities: npt.NDArray[np.int64]


def find_layout(index_path: Path, index: Index, reader: RecordReader) -> Layout:
    """Tell the layouts apart by key 0: it is an image, or it states which keys are identity headers.

    Raises DataError when the index and the record file do not fit each other, or key 0 was cut off.
    """
    last = int(index.offsets[-1])
    key_0 = np.flatnonzero(index.keys == 0)
    first = int(index.offsets[key_0[0]]) if len(key_0) else last
    heads = read_heads(reader, np.array([first, last], np.int64))
    if not heads.is_identity[0]:
        return Layout("sequential", index, np.empty(0, np.int64))
    if not len(key_0):
        raise RecordError(reader.path, reader.size, "the record of key 0", "the end", cut_action(reader.path))
    by_key = np.full(len(index.keys), -1, np.int64)
    within = index.keys < len(by_key)
    by_key[index.keys[within]] = index.offsets[within]
    try:
        if not within.all():
            raise HeaderError(f"keys from 0 to {len(by_key) - 1}", f"{index.keys.max()}")
        start = find_identities(reader, by_key, (float(heads.labels[0, 0]), float(heads.labels[0, 1])))
    except HeaderError as error:
        raise DataError(f"{index_path}: {error} ({rebuild_action(reader.path)})") from None
    is_image = (index.keys > 0) & (index.keys < start)
    return Layout("insightface", Index(index.keys[is_image], index.offsets[is_image]), by_key[start:])


def labels_of_ranges(layout: Layout, reader: RecordReader) -> Labels | None:
    """Class of every image, int64 (num_samples,): the number of the identity header whose range holds its key.

    None when there are no identity headers, or keys go above 2^24: float32 rounds such ranges, and no rounded range
    is used for anything. Raises RecordError when the ranges do not cover every image just once.
    """
    count = len(layout.images.keys)
    if not len(layout.identities) or count + 1 > EXACT:
        return None
    heads = read_heads(reader, layout.identities)
    starts, ends = heads.labels[:, 0].astype(np.float64), heads.labels[:, 1].astype(np.float64)
    order = np.lexsort((ends, starts))  # by start; an empty range before the one that starts with it
    expected = np.concatenate(([1.0], ends[order[:-1]]))
    wrong = ~heads.is_identity[order] | (starts[order] != expected) | (ends[order] < starts[order])
    wrong[-1] |= ends[order[-1]] != count + 1
    if wrong.any():
        row = int(order[np.argmax(wrong)])
        raise RecordError(
            reader.path,
            int(layout.identities[row]),
            f"an identity header with the keys from {expected[np.argmax(wrong)]:.0f} on, all of them to {count}",
            f"the labels {starts[row]:g}, {ends[row]:g}",
            images_only_action(reader.path),
        )
    by_key = np.repeat(order, (ends - starts)[order].astype(np.int64))
    return by_key[layout.images.keys - 1].astype(np.int64, copy=False)


def labels_of_images(layout: Layout, reader: RecordReader, *, pair: bool, num_classes: int) -> Labels:
    """Class of every image by its own header, int64 (num_samples,).

    Raises RecordError naming the first record without a valid class or without an image, or, when every record is
    an image, one that the index leaves out.
    """
    images = layout.images
    heads = read_heads(reader, images.offsets)
    if layout.name == "sequential":
        _check_complete(images, heads, reader)
    labels, valid = _classes(heads, pair=pair)
    for fine, expected in (
        (heads.image_bytes > 0, "an image behind the header"),
        (valid & (labels < num_classes), f"a class number from 0 to {num_classes - 1}"),
    ):
        if not fine.all():
            row = int(np.argmin(fine))
            found = ", ".join(f"{value:g}" for value in heads.labels[row, : 2 if pair else 1])
            raise RecordError(
                reader.path,
                int(images.offsets[row]),
                expected,
                f"label {found} and {heads.image_bytes[row]} bytes in key {images.keys[row]}",
                "correct property, or pack the set again",
            )
    return labels


def _check_complete(images: Index, heads: Heads, reader: RecordReader) -> None:
    """Between and behind the images of an index there may be identity headers and a cut record, but no image."""
    begin, end = np.append(0, heads.end), np.append(images.offsets, reader.size)
    for at in begin[begin != end].tolist():
        try:
            unlisted = not read_heads(reader, np.array([at], np.int64)).is_identity[0]
        except CutError:
            unlisted = False
        if unlisted:
            raise RecordError(
                reader.path, at, "an image that the index lists", "one that it lacks", rebuild_action(reader.path)
            )


def _classes(heads: Heads, *, pair: bool) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """(class numbers, which of them are valid): `data.header.class_of` on arrays."""
    used = heads.labels if pair else heads.labels[:, :1]
    with np.errstate(invalid="ignore"):
        valid = ((used >= 0) & (used < EXACT) & (used == np.floor(used))).all(axis=1)
        whole = np.where(valid[:, None], used, 0).astype(np.int64)
    return (whole[:, 0] * EXACT + whole[:, 1] if pair else whole[:, 0]), valid
