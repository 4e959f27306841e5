"""What is in a set or a verification set: counts, sizes, formats, and pictures to look at.

Legend: C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.contact_sheet import Pixels
from data.errors import DataError
from data.loading.decode import DecodeError, decode_image
from data.rec.records import RecordSet
from data.verification_bin import VerificationSet

_SAMPLE = 1000
"""Images looked at for their format and size: spread over the file."""
Facts = dict[str, Any]


def facts_of(records: RecordSet) -> Facts:
    """Names and numbers about a set, for people and machines."""
    counts_C = np.bincount(records.labels, minlength=records.num_classes)
    low, quarter, median, three_quarters, high = np.percentile(counts_C, [0, 25, 50, 75, 100]).round().astype(int)
    spread = np.unique(np.linspace(0, records.num_samples - 1, _SAMPLE).astype(np.int64))
    images = [records.image(sample)[1] for sample in spread.tolist()]
    sizes = np.array([len(image) for image in images])
    height, width = records.image_size
    return {
        "layout": records.layout,
        "images": records.num_samples,
        "identities": records.num_classes,
        "image size": f"{height}x{width} by property",
        "record files": f"{', '.join(records.names)}, {records.bytes / 1e6:.1f} MB",
        "images of an identity": f"{low} at least, {quarter} / {median} / {three_quarters} quartiles, {high} at most",
        "identities without images": int(np.count_nonzero(counts_C == 0)),
        "identities with one image": int(np.count_nonzero(counts_C == 1)),
        f"formats of {len(images)} images": _formats(images),
        f"bytes of {len(images)} images": f"{sizes.min()} at least, {sizes.mean():.0f} mean, {sizes.max()} at most",
    }


def facts_of_pairs(pairs: VerificationSet, size: tuple[int, int]) -> Facts:
    """The same of a verification set. size: (height, width) that its images should have."""
    bad = []
    for number, image in enumerate(pairs.images):
        try:
            decode_image(image, size)
        except DecodeError as error:
            bad.append(f"image {number}: {error}")
    return {
        "pairs": len(pairs.same),
        "pairs of one person": int(pairs.same.sum()),
        "different images": len(set(pairs.images)),
        "formats": _formats(pairs.images),
        "images that do not decode": len(bad),
        **({"the first of them": bad[0]} if bad else {}),
    }


def lines(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def histogram(records: RecordSet, path: Path) -> None:
    """How many identities have how many images, as a picture. Raises DataError when it cannot be written."""
    counts_C = np.bincount(records.labels, minlength=records.num_classes)
    top = max(1, int(counts_C.max()))
    edges = np.unique(np.round(np.geomspace(1, top + 1, 41)).astype(int)) - 0.5
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.hist(counts_C[counts_C > 0], bins=edges.tolist(), color="#4477aa")
    panel.set(xscale="log", xlabel="images of an identity", ylabel="identities")
    panel.axvline(float(counts_C.mean()), color="#cc3311", linewidth=1, label=f"mean {counts_C.mean():.1f}")
    panel.legend(frameon=False)
    panel.set_title(f"{records.num_samples:,} images of {records.num_classes:,} identities", fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot write the picture ({error})") from None


def first_images(records: RecordSet, *, rows: int, columns: int) -> tuple[list[list[Pixels]], list[str]]:
    """Images of the first classes that have any, a row each, and captions. Raises DecodeError at a damaged one."""
    order = np.argsort(records.labels, kind="stable")
    starts = np.flatnonzero(np.diff(records.labels[order], prepend=-1))[:rows]
    sheet, captions = [], []
    for start in starts.tolist():
        label = int(records.labels[order[start]])
        samples: npt.NDArray[np.int64] = order[start : start + columns]
        samples = samples[records.labels[samples] == label]
        sheet.append([decode_image(records.image(int(sample))[1], records.image_size) for sample in samples])
        captions.append(f"class {label}, samples {', '.join(map(str, samples.tolist()))}")
    return sheet, captions


def first_pairs(pairs: VerificationSet, size: tuple[int, int], *, rows: int) -> tuple[list[list[Pixels]], list[str]]:
    """The first pairs, a row each. Raises DecodeError at a damaged image."""
    numbers = range(min(rows, len(pairs.same)))
    sheet = [[decode_image(image, size) for image in pairs.images[2 * n : 2 * n + 2]] for n in numbers]
    return sheet, [f"{n}: {'one person' if pairs.same[n] else 'two'}" for n in numbers]


def _formats(images: list[memoryview] | list[bytes]) -> str:
    counted = Counter(_format(image) for image in images).most_common()
    return ", ".join(f"{count} {name}" for name, count in counted)


def _format(image: memoryview | bytes) -> str:
    start = bytes(image[:8])
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "PNG" if start == b"\x89PNG\r\n\x1a\n" else "unknown"
