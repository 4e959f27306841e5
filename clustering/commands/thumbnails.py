"""Small pictures of samples, straight from their records."""

from __future__ import annotations

from functools import lru_cache

import cv2
import simplejpeg

from data.errors import DataError
from data.loading.decode import decode_image
from data.rec.records import RecordSet

SIDE = 64
"""Pixels."""
_QUALITY = 80


class Thumbnails:
    """Thumbnails of a set; a callable, sample -> JPEG of SIDE x SIDE pixels, None for an image that does not decode."""

    def __init__(self, records: RecordSet) -> None:
        self._records = records
        self._cached = lru_cache(maxsize=4096)(self._make)

    def __call__(self, sample: int) -> bytes | None:
        return self._cached(sample)

    def _make(self, sample: int) -> bytes | None:
        try:
            pixels = decode_image(self._records.image(sample)[1], self._records.image_size)
        except DataError:
            return None
        small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        return bytes(simplejpeg.encode_jpeg(small, _QUALITY, colorsubsampling="420"))
