"""What is in a set, in a few lines: layout, counts, sizes, formats, how the images spread over the classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from data.records import RecordSet

_SAMPLE = 1000
"""Images looked at for their format and size: spread over the file."""


def summary(folder: Path) -> str:
    """Lines `name: value` about a set. Raises DataError when it cannot be opened."""
    records = RecordSet.open(folder)
    counts = np.bincount(records.labels, minlength=records.num_classes)
    low, quarter, median, three_quarters, high = np.percentile(counts, [0, 25, 50, 75, 100]).round().astype(int)
    spread = np.unique(np.linspace(0, records.num_samples - 1, _SAMPLE).astype(np.int64))
    images = [records.image(sample)[1] for sample in spread.tolist()]
    sizes = np.array([len(image) for image in images])
    formats = Counter(_format(image) for image in images).most_common()
    height, width = records.image_size
    lines = {
        "layout": records.layout,
        "images": f"{records.num_samples}",
        "identities": f"{records.num_classes}",
        "image size": f"{height}x{width} by property",
        "record file": f"{(folder / 'train.rec').stat().st_size / 1e6:.1f} MB",
        "images of an identity": f"{low} at least, {quarter} / {median} / {three_quarters} quartiles, {high} at most",
        "identities without images": f"{np.count_nonzero(counts == 0)}",
        "identities with one image": f"{np.count_nonzero(counts == 1)}",
        f"formats of {len(images)} images": ", ".join(f"{count} {name}" for name, count in formats),
        f"bytes of {len(images)} images": f"{sizes.min()} at least, {sizes.mean():.0f} mean, {sizes.max()} at most",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _format(image: memoryview) -> str:
    start = bytes(image[:8])
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "PNG" if start == b"\x89PNG\r\n\x1a\n" else "unknown"
