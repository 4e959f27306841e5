"""What a loader hands out, what every loader can do, and what it needs of a training set."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's images of one step."""

    images: Tensor
    """uint8 (B, 3, H, W), RGB 0 … 255, on the loader's device; channels last in memory, as decoders write them."""
    labels: Tensor
    """int64 (B,), the class, or -1 for an image that did not decode: losses, bank and counters skip the row."""
    sample_ids: Tensor
    """int64 (B,), the number of the image in the set."""


class ImageSource(Protocol):
    """The part of `data.rec.records.RecordSet` that loaders use; it is read from several threads at once."""

    @property
    def num_samples(self) -> int: ...
    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 (num_samples,), the class of every image; only orders that go by class ask for it."""

    @property
    def far(self) -> bool:
        """Whether it is worth while to say `ahead` what is going to be read."""

    def ahead(self, samples: npt.NDArray[np.int64]) -> None:
        """Some samples are going to be read."""

    def image(self, sample: int) -> tuple[int, memoryview]:
        """(label, encoded image); a DataError or RecordError ends the epoch, see `data.loading.base_loader`."""

    def image_batch(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[memoryview]]:
        """The same of several (n,): int64 (n,) labels, n encoded images."""


class Loader(Protocol):
    """Batches of one rank. Both loaders give the same ones: ids and labels exactly, pixels within 3 grey levels."""

    backend: str
    steps_per_epoch: int
    """The same on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batches of an epoch, from the image `start` of its order on: as many as all ranks together have had, whatever
        their number was. Closing the generator ends its threads.
        """

    def close(self) -> None:
        """Close every epoch that is still open."""
