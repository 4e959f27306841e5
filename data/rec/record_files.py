"""What opening a set finds out: where its images are, and the class of each.

Legend: N images of all files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.rec.index import Index, read_index, rebuild
from data.rec.layout import Labels, Layout, find_layout, labels_of_images, labels_of_ranges
from data.rec.places import Place, index_of
from data.rec.properties import Properties
from data.rec.recordio import Records, Where
from data.rec.samples import Samples
from data.stores.cache import Table

_log = logging.getLogger(__name__)
SPREAD = 1024
"""Images looked at across the whole set when one with identity headers is opened: a few milliseconds, and an index of
another file, or labels that disagree with the identity headers, show at once."""
_MANY = 1 << 20
"""Headers of images that take so long to read that what they say is worth keeping."""


class FoundOut(NamedTuple):
    """slow: whether it took long."""

    table: Table
    slow: bool


def find_out(
    place: Place, names: Sequence[str], readers: Sequence[Records], properties: Properties, *, spread: int = SPREAD
) -> FoundOut:
    """Read indexes and headers. spread: images that are looked at where ranges of keys tell the classes.

    Raises DataError for anything missing, damaged or contradictory.
    """
    there = set(place.names)
    layouts, slow = [], False
    for name, reader in zip(names, readers, strict=True):
        path: Where = reader.path
        if index_of(name) in there:
            path = place.local(index_of(name))
            index = read_index(path, reader)
        else:
            _log.info("%s has no index: it is scanned", reader.path)
            index, slow = rebuild(reader).index, True
        layouts.append(find_layout(path, index, reader))
    labels = None
    if len(names) == 1 and len(layouts[0].identities):
        _check_classes(place, properties, len(layouts[0].identities), "identity headers")
        labels, read = _by_ranges(layouts[0], readers[0], properties)
        slow |= read > _MANY
    if labels is not None and not Samples(readers, _table(layouts, labels), properties).agree(spread):
        labels = None  # identity headers need not stand in the order of the classes; the images' own always tell
    if labels is None:
        labels = np.concatenate([
            _by_images(layout, reader, properties) for layout, reader in zip(layouts, readers, strict=True)
        ])  # fmt: skip
        slow |= len(labels) > _MANY
    if len(names) > 1 or not len(layouts[0].identities):
        _check_classes(place, properties, int(labels.max()) + 1, "classes, by the highest label")
    return FoundOut(_table(layouts, labels), slow)


def _table(layouts: Sequence[Layout], labels: Labels) -> Table:
    images = [layout.images for layout in layouts]
    together = (
        images[0] if len(images) == 1 else Index(*(np.concatenate(column) for column in zip(*images, strict=True)))
    )
    name = ", ".join(sorted({layout.name for layout in layouts}))
    return Table(name, [len(each.keys) for each in images], together.keys, together.offsets, labels)


def _by_ranges(layout: Layout, reader: Records, properties: Properties) -> tuple[Labels, int]:
    """(class of every image, how many images' own headers had to be read)."""
    found = labels_of_ranges(layout, reader)
    assert found is not None
    labels, exact = found
    count = len(labels) - int(np.count_nonzero(exact))
    if count:
        rest = layout._replace(images=Index(layout.images.keys[~exact], layout.images.offsets[~exact]))
        labels[~exact] = _by_images(rest, reader, properties)
    return labels, count


def _by_images(layout: Layout, reader: Records, properties: Properties) -> Labels:
    count = len(layout.images.keys)
    if count > _MANY:
        _log.info("%s: the headers of %d images are read, once", reader.path, count)
    return labels_of_images(layout, reader, pair=properties.pair, num_classes=properties.num_classes)


def _check_classes(place: Place, properties: Properties, counted: int, what: str) -> None:
    if counted != properties.num_classes:
        raise DataError(
            f"{place.address}/property: expected as many classes as the records have, found {properties.num_classes} "
            f"against {counted} {what} (correct the first number of property)"
        )
