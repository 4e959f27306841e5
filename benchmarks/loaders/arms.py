"""Ways to read, decode and batch the same records.

Legend: B images of a batch, H, W pixels, 3 colours.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch

from backbones.base import normalise_pixels
from benchmarks.loaders.peers import WORKERS, Batches, dali_reader, data_loader
from configs.augment import AugmentConfig
from configs.schema import DataConfig
from data.loading.loader import build_loader
from data.rec.records import RecordSet

BARE, FILLING = "bare simplejpeg", "simplejpeg into batches, flips"
OURS, FLOATS, AUGMENTED = "ours, cpu", "ours, cpu, to floats", "ours, cpu, augmented"
OURS_DALI, DALI_READER, DATA_LOADER = "ours, dali", "DALI, its own mxnet reader", "DataLoader, insightface's manner"
_EVERYTHING = AugmentConfig(colour=0.2, grey=0.2, low_resolution=0.2, blur=0.2, crop=0.2, occlusion=0.2)

Counts = Iterator[tuple[int, int]]
"""(images, sum of their labels), for a batch or several."""


class Arm(NamedTuple):
    """A way to deliver batches."""

    way: str
    threads: str
    """That decode: their number, or that of the worker processes."""
    open: Callable[[int], Counts]
    """Get ready for so many batches. Work begins with the first `next`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one pass."""

    wall: float
    cpu: float
    """Seconds of all threads of the process and its workers: another process on the same cores does not count."""
    images: int
    label_sum: int


def run(arm: Arm, steps: int, device: torch.device) -> Outcome:
    """A pass over so many batches; starts and ends of threads and workers are part of it, as of every epoch."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    counts = arm.open(steps)
    wait()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    images, label_sums = zip(*counts, strict=True)
    wait()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    return Outcome(wall=wall, cpu=cpu, images=sum(images), label_sum=sum(label_sums))


def _cpu_seconds() -> float:
    """Of this process and of workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def arms(
    records: RecordSet, *, batch: int, threads: Sequence[int], device: torch.device
) -> tuple[list[Arm], dict[str, str]]:
    """Ways that can run here, and why the others are left out. records: as `benchmarks.loaders.records` makes them."""
    encoded = [records.image(sample)[1] for sample in range(records.num_samples)]
    left_out: dict[str, str] = {}
    try:
        import nvidia.dali  # noqa: F401, PLC0415 - optional
    except (ImportError, OSError) as error:
        left_out = dict.fromkeys((OURS_DALI, DALI_READER), f"DALI does not load ({error})")
    found: list[Arm] = []
    for count in threads:
        ours = partial(_ours, records, batch=batch, threads=count, device=device)
        reader = partial(dali_reader, Path(records.address), batch=batch, threads=count, device=device)
        ways: dict[str, Callable[[int], Counts]] = {
            BARE: partial(_bare, records, encoded, batch=batch, threads=count),
            FILLING: partial(_filling, records, encoded, batch=batch, threads=count),
            OURS: ours,
            FLOATS: partial(ours, floats=True),
            AUGMENTED: partial(ours, augment=_EVERYTHING),
            OURS_DALI: partial(ours, backend="dali"),
            DALI_READER: partial(_theirs, reader),
        }
        found += [Arm(way, f"{count}", open_) for way, open_ in ways.items() if way not in left_out]
    loader = partial(data_loader, Path(records.address), batch=batch, device=device)
    return [*found, Arm(DATA_LOADER, f"{WORKERS} workers", partial(_theirs, loader))], left_out


def _bare(records: RecordSet, encoded: Sequence[memoryview], steps: int, *, batch: int, threads: int) -> Counts:
    """Each thread decodes its share of the images into the same pixels again and again, and does nothing else."""

    def decode(share: range) -> tuple[int, int]:
        pixels = np.empty((*records.image_size, 3), np.uint8)
        for sample in share:
            simplejpeg.decode_jpeg(encoded[sample], "RGB", buffer=pixels)
        return len(share), int(records.labels[share].sum())

    yield from _by_threads(decode, steps * batch, threads)


def _filling(records: RecordSet, encoded: Sequence[memoryview], steps: int, *, batch: int, threads: int) -> Counts:
    """The least that a loader does: a shuffled order, batches in memory of their own, every other image mirrored."""
    order = np.random.default_rng(0).permutation(steps * batch).reshape(steps, batch)

    def fill(share: range) -> tuple[int, int]:
        for samples_B in order[share]:
            pixels_BHW3 = np.empty((batch, *records.image_size, 3), np.uint8)
            for pixels, sample in zip(pixels_BHW3, samples_B.tolist(), strict=True):
                simplejpeg.decode_jpeg(encoded[sample], "RGB", buffer=pixels)
                if sample % 2:
                    cv2.flip(pixels, 1, dst=pixels)
        return len(share) * batch, int(records.labels[order[share]].sum())

    yield from _by_threads(fill, steps, threads)


def _by_threads(work: Callable[[range], tuple[int, int]], count: int, threads: int) -> Counts:
    """Of range(count), each thread takes every so many-th."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, [range(first, count, threads) for first in range(threads)])


def _ours(
    records: RecordSet,
    steps: int,
    *,
    batch: int,
    threads: int,
    device: torch.device,
    backend: Literal["cpu", "dali"] = "cpu",
    augment: AugmentConfig | None = None,
    floats: bool = False,
) -> Counts:
    """floats: also make of each batch what peers deliver, which training does on its device."""
    loader = build_loader(
        records,
        batch_size=batch,
        rank=0,
        world_size=1,
        seed=0,
        backend=backend,
        device=device,
        threads=threads,
        prefetch=DataConfig().prefetch,
        flip=True,
        augment=augment,
    )

    def counts() -> Counts:
        with closing(loader.epoch(0)) as stream:
            for taken in islice(stream, steps):
                if floats:
                    normalise_pixels(taken.images)
                yield len(taken.images), int(taken.labels.sum())

    return counts()


def _theirs(open_: Callable[..., Batches], steps: int) -> Counts:
    return ((len(images), int(labels.sum())) for images, labels in open_(steps=steps))
