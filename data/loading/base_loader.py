"""What both loaders share: which samples, which flips, what becomes of images that do not decode.

An image that does not decode keeps its sample id, gets label -1 and the pixels of the next good image of its local
batch (round the end), so that BatchNorm sees faces only; with no good image at all the batch is black. Each such
sample is named once in the log. Anything else that is wrong (record structure, labels) raises, in its batch's turn.
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.augment import AugmentConfig
from data.errors import DataError
from data.loading.augment import Augment, Drawn
from data.loading.batch import Batch, ImageSource
from data.loading.transforms import flips
from data.order.sampler import BatchPlan

_log = logging.getLogger(__name__)
_PLANNED = 4096
"""Images whose places in the order are computed together."""


class Planned(NamedTuple):
    """What a local batch is to be."""

    samples_B: npt.NDArray[np.int64]
    flips_B: npt.NDArray[np.bool_]
    drawn: Drawn | None
    """None: nothing."""


class Draft:
    """A local batch in the making. Threads fill rows of their own; only the consumer reads all of them."""

    def __init__(self, plan: Planned, *, pinned: bool) -> None:
        samples_B, self.flips_B, self.drawn = plan
        self.facts_2B = torch.empty(2, len(samples_B), dtype=torch.int64, pin_memory=pinned)
        self.labels_B, self.samples_B = self.facts_2B.numpy()  # together, so that one copy takes both to a GPU
        self.samples_B[:] = samples_B
        self.faults: dict[int, str] = {}
        """Row to reason, of images that do not decode."""

    def donors(self) -> npt.NDArray[np.int64] | None:
        """Row whose pixels each row shows: its own, or the next good one's. int64 (B,); None: there is no good one."""
        rows = np.arange(len(self.samples_B))
        good = np.setdiff1d(rows, list(self.faults))
        if not len(good):
            return None
        return good[np.searchsorted(good, rows) % len(good)]


class RecordLoader(ABC):
    """A loader over an `ImageSource`; see `data.loading.batch.Loader`, and `data.loading.loader.build_loader` for the
    arguments.

    At most `prefetch` drafts are in work beyond the batch that the consumer holds.
    """

    backend: str

    def __init__(
        self,
        records: ImageSource,
        *,
        plan: BatchPlan,
        device: torch.device,
        threads: int,
        prefetch: int,
        flip: bool,
        augment: AugmentConfig,
    ) -> None:
        cv2.setNumThreads(1)  # in this process: our threads are as many as wanted, and OpenCV's wait for each other
        self._records, self._plan, self._device = records, plan, device
        self._augment = Augment(augment, size=records.image_size, seed=plan.order.seed)
        self._threads, self._ahead, self._flip = threads, prefetch, flip
        self._pinned = device.type == "cuda"
        self._named: set[int] = set()
        self._open: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        self.steps_per_epoch = plan.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """See `data.loading.batch.Loader`. Work begins with the first `next`. Raises DataError when there is no such
        start.
        """
        if epoch < 0:
            raise DataError(f"expected an epoch of 0 or more, got {epoch}")
        stream = self._batches(epoch, self._plan.starts(start))
        self._open.add(stream)
        return stream

    def close(self) -> None:
        """Close every epoch that is still open. The records stay open: they belong to the caller."""
        for stream in list(self._open):
            stream.close()

    @abstractmethod
    def _batches(self, epoch: int, starts: range) -> Generator[Batch, None, None]:
        """The generator behind `epoch`."""

    def _plans(self, epoch: int, starts: range) -> Iterator[Planned]:
        """Of each step; several are computed together, as a few numbers cost NumPy no less than a thousand."""
        together = max(1, _PLANNED // self._plan.batch_size)
        for begin in range(0, len(starts), together):
            some = starts[begin : begin + together]
            samples_SB = self._plan.samples(epoch, some)
            if self._flip:
                flips_SB = flips(samples_SB, seed=self._plan.order.seed, epoch=epoch)
            else:
                flips_SB = np.zeros(samples_SB.shape, np.bool_)
            for start, samples_B, flips_B in zip(some, samples_SB, flips_SB, strict=True):
                if self._records.far:
                    first = start == starts.start
                    self._records.ahead(self._plan.coming(epoch, start, samples_B, first=first))
                yield Planned(samples_B, flips_B, None if self._augment.idle else self._augment.draw(samples_B, epoch))

    def _finish(self, draft: Draft, images_BHW3: Tensor) -> Batch:
        """The batch of a complete draft: bad rows named and unlabelled, everything on the device."""
        for row, reason in sorted(draft.faults.items()):
            draft.labels_B[row] = -1
            sample = int(draft.samples_B[row])
            if sample not in self._named:
                self._named.add(sample)
                _log.warning("sample %d does not decode, it is left out: %s", sample, reason)
        labels_B, samples_B = draft.facts_2B.to(self._device, non_blocking=True)
        images_BHW3 = images_BHW3.to(self._device, non_blocking=True)
        return Batch(images_BHW3.permute(0, 3, 1, 2), labels_B, samples_B)
