"""The records that all ways of `benchmarks.loaders.arms` read, in a temporary folder: the first of a set, or faces.

Without identity headers, as DALI's reader takes every record of the index for an image and its decoder fails on them;
and good JPEGs alone, as DALI and a bare loop end at the first image that is none. The file has just been written and
so is in memory: what is compared is work, not disks.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import simplejpeg
from rich.console import Console
from rich.progress import track

from data.errors import DataError
from data.loading.decode import DecodeError, check_image
from data.making.pack import Encoder, encode_all, every_image, write_sequence
from data.making.sources import IMAGE_SIZE, SyntheticSource
from data.rec.properties import Properties
from data.rec.records import RecordSet

_OF_AN_IDENTITY = 20
_FOR_A_WORKER = 1000  # drawn faces, that the start of a process be worth it
_JPEG = b"\xff\xd8"
T = TypeVar("T")


@contextlib.contextmanager
def working_copy(folder: Path | None, images: int, quality: int | None = None) -> Iterator[RecordSet]:
    """The first `images` images of the set in a folder, or as many drawn faces: open, and gone at the end.

    quality: encode them anew, by OpenCV with its own subsampling of colours, as mxnet's im2rec does. Raises DataError
    when the set is damaged, or has no good JPEG among them.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        if folder is None:
            _draw(copy, images, quality)
        else:
            with contextlib.closing(RecordSet.open(folder)) as whole:
                _copy(copy, whole, images, quality)
        with contextlib.closing(RecordSet.open(copy)) as records:
            yield records


def _draw(copy: Path, images: int, quality: int | None) -> None:
    identities = -(-images // _OF_AN_IDENTITY)
    source = SyntheticSource(identities=identities, images_per_identity=_OF_AN_IDENTITY, seed=0)
    wanted = every_image(source.images)[:images]
    with Encoder(min(os.cpu_count() or 1, 1 + images // _FOR_A_WORKER), source) as encoder:
        encoded = _anew(_shown(encode_all(encoder, source, wanted), "drawing faces", images), quality)
        _write(copy, zip(wanted[:, 0].tolist(), encoded, strict=True), identities, (IMAGE_SIZE, IMAGE_SIZE))


def _copy(copy: Path, whole: RecordSet, images: int, quality: int | None) -> None:
    """Classes are numbered anew, as a part may leave some out."""
    looked_at = range(min(images, whole.num_samples))
    good = [sample for sample in _shown(looked_at, "copying records", len(looked_at)) if _is_good_jpeg(whole, sample)]
    if not good:
        raise DataError(f"{whole.address}: expected good JPEGs, found none in the first {len(looked_at)} images")
    classes, labels = np.unique(whole.labels[good], return_inverse=True)
    encoded = _anew((bytes(whole.image(sample)[1]) for sample in good), quality)
    _write(copy, zip(labels.tolist(), encoded, strict=True), len(classes), whole.image_size)


def _anew(encoded: Iterable[bytes], quality: int | None) -> Iterable[bytes]:
    if quality is None:
        return encoded
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    pixels = (simplejpeg.decode_jpeg(image, "BGR") for image in encoded)
    return (cv2.imencode(".jpg", bgr, options)[1].tobytes() for bgr in pixels)


def _is_good_jpeg(whole: RecordSet, sample: int) -> bool:
    _, image = whole.image(sample)
    try:
        check_image(image, whole.image_size)
    except DecodeError:
        return False
    return image[: len(_JPEG)] == _JPEG


def _shown(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """With a progress line."""
    return track(items, what, total, console=Console(stderr=True), transient=True)


def _write(folder: Path, images: Iterable[tuple[int, bytes]], classes: int, size: tuple[int, int]) -> None:
    write_sequence(folder / "train.rec", folder / "train.idx", images, num_classes=classes)
    (folder / "property").write_text(Properties(num_classes=classes, image_size=size).text(), encoding="utf-8")
