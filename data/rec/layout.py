"""Which records of a file are images, and the class of each: from identity headers where these tell, else by a scan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.rec.header import EXACT, HeaderError
from data.rec.heads import Heads, read_heads
from data.rec.index import Index, find_identities
from data.rec.recordio import CutError, RecordError, Records, Where, cut_action, images_only_action, rebuild_action

Labels = npt.NDArray[np.int64]


class Layout(NamedTuple):
    """name: "insightface" or "sequential". images: keys and offsets of the images in file order.

    identities: int64 (C,), offsets of the identity headers in the order of their keys; empty when sequential.
    """

    name: str
    images: Index
    identities: npt.NDArray[np.int64]


def find_layout(index_path: Where, index: Index, reader: Records) -> Layout:
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
    by_key = _by_key(index)
    try:
        if by_key is None:
            raise HeaderError(f"keys from 0 to {len(index.keys) - 1}", f"{index.keys.max()}")
        start = find_identities(reader, by_key, (float(heads.labels[0, 0]), float(heads.labels[0, 1])))
    except HeaderError as error:
        raise DataError(f"{index_path}: {error} ({rebuild_action(reader.path)})") from None
    is_image = slice(start - 1) if _in_order(index) else (index.keys > 0) & (index.keys < start)
    return Layout("insightface", Index(index.keys[is_image], index.offsets[is_image]), by_key[start - 1 :])


def _in_order(index: Index) -> bool:
    """Keys 1, 2, … and 0 behind them, as builders write them: read_index has seen that none comes twice."""
    keys = index.keys
    return bool(keys[-1] == 0 and len(keys) > 1 and keys[0] == 1 and keys[-2] == len(keys) - 1) and bool(
        (keys[1:-1] > keys[:-2]).all()
    )


def _by_key(index: Index) -> npt.NDArray[np.int64] | None:
    """Offsets of the keys 1, 2, …; a view of those of the index where it is in order. None: a key is too high."""
    if _in_order(index):
        return index.offsets[:-1]
    if index.keys.max() >= len(index.keys):
        return None
    by_key = np.empty(len(index.keys), np.int64)
    by_key[index.keys] = index.offsets
    return by_key[1:]


def labels_of_ranges(layout: Layout, reader: Records) -> tuple[Labels, npt.NDArray[np.bool_]] | None:
    """(classes, which images they hold for): int64 and bool (num_samples,); a class is the number of the identity
    header whose range holds the image's key.

    float32 rounds ranges from 2^24 on, and no rounded one is used: they hold for keys below that. None when there are
    no identity headers. Raises RecordError when the ranges do not cover every one of these images just once.
    """
    count = len(layout.images.keys)
    if not len(layout.identities):
        return None
    heads = read_heads(reader, layout.identities)
    starts, ends = heads.labels[:, 0].astype(np.float64), heads.labels[:, 1].astype(np.float64)
    last = min(count, EXACT - 1)
    order = np.lexsort((ends, starts))  # by start; an empty range before the one that starts with it
    order = order[starts[order] <= last + 1]
    expected = np.concatenate(([1.0], ends[order[:-1]]))
    wrong = ~heads.is_identity[order] | (starts[order] != expected) | (ends[order] < starts[order])
    wrong[-1] |= ends[order[-1]] < last + 1 if last < count else ends[order[-1]] != count + 1
    if wrong.any():
        row = int(order[np.argmax(wrong)])
        raise RecordError(
            reader.path,
            int(layout.identities[row]),
            f"an identity header with the keys from {expected[np.argmax(wrong)]:.0f} on, all of them to {count}",
            f"the labels {starts[row]:g}, {ends[row]:g}",
            images_only_action(reader.path),
        )
    by_key = np.repeat(order, (np.minimum(ends, last + 1) - starts)[order].astype(np.int64).clip(min=0))
    exact = layout.images.keys <= last
    classes = by_key[np.minimum(layout.images.keys, last) - 1]
    return classes.astype(np.int64, copy=False), exact


def labels_of_images(layout: Layout, reader: Records, *, pair: bool, num_classes: int) -> Labels:
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


def _check_complete(images: Index, heads: Heads, reader: Records) -> None:
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
    """(class numbers, which of them are valid): `data.rec.header.class_of` on arrays."""
    used = heads.labels if pair else heads.labels[:, :1]
    with np.errstate(invalid="ignore"):
        valid = ((used >= 0) & (used < EXACT) & (used == np.floor(used))).all(axis=1)
        whole = np.where(valid[:, None], used, 0).astype(np.int64)
    return (whole[:, 0] * EXACT + whole[:, 1] if pair else whole[:, 0]), valid
