"""The images of a set in a random order, with bounded memory and both files read and written from front to back.

A sample's place is by a 64-bit hash of its number. Images first go, in file order, into buckets by the hash's top bits,
each small enough for the memory allowed; then bucket by bucket, sorted in memory. No seek is longer than a bucket: on
disks and object stores that take a hundred seeks a second, that is the difference between hours and weeks.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.order.hashing import SHUFFLE, keys, mix
from data.rec.records import RecordSet

_HEAD = struct.Struct("<QQI")  # hash, label, bytes of the image
_MOST_BUCKETS = 256
"""Files open at a time."""
MEMORY = 1 << 28


def shuffled(records: RecordSet, *, seed: int, folder: Path, memory: int = MEMORY) -> Iterator[tuple[int, bytes]]:
    """(label, encoded image) of every sample, in an order that seed and number of samples decide.

    folder: for the buckets, which need as much room as the set; they go with the iterator. memory: bytes of a bucket,
    about. Raises DataError when they cannot be written, or memory is too little for so many images.
    """
    size = records.bytes
    bits = max(0, (max(1, size - 1) // memory).bit_length())
    if 1 << bits > _MOST_BUCKETS:
        least = -(-size // (_MOST_BUCKETS << 19))
        raise DataError(f"memory: expected {least} MB or more for {size / 1e9:.0f} GB of records, got {memory >> 20}")
    try:
        with ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".shuffle.")))
            buckets = [stack.enter_context((place / f"{n}").open("w+b")) for n in range(1 << bits)]
            key = keys(1, seed=seed, epoch=0, purpose=SHUFFLE)
            for start in range(0, records.num_samples, 1 << 16):
                samples = np.arange(start, min(start + (1 << 16), records.num_samples), dtype=np.int64)
                hashes = mix(samples.astype(np.uint64) ^ key)
                for sample, value in zip(samples.tolist(), hashes.tolist(), strict=True):
                    label, image = records.image(sample)
                    bucket = buckets[value >> (64 - bits)] if bits else buckets[0]
                    bucket.write(_HEAD.pack(value, label, len(image)))
                    bucket.write(image)
            for bucket in buckets:
                for _, label, data in sorted(_read(bucket)):  # hashes differ: `mix` is one to one
                    yield label, data
                bucket.truncate(0)
    except OSError as error:
        raise DataError(f"{folder}: cannot keep the images there meanwhile ({error.strerror})") from None


def _read(bucket: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Hash, label, image."""
    bucket.seek(0)
    while head := bucket.read(_HEAD.size):
        value, label, length = _HEAD.unpack(head)
        yield value, label, bucket.read(length)
