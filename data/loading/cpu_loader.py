"""Batches decoded by a pool of threads, each image straight into its row of the batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import cv2
from torch import Tensor

from data.loading.augment import apply_
from data.loading.base_loader import Draft, Planned, RecordLoader
from data.loading.batch import Batch
from data.loading.decode import DecodeError, decode_image
from data.loading.prefetch import prefetch
from data.loading.recycling import Recycled


class _PixelDraft(Draft):
    """A draft with room for its pixels."""

    def __init__(self, plan: Planned, images_BHW3: Tensor, *, pinned: bool) -> None:
        super().__init__(plan, pinned=pinned)
        self.images_BHW3, self.pixels_BHW3 = images_BHW3, images_BHW3.numpy()

    def patched(self) -> Tensor:
        """The images, bad rows replaced: uint8 (B, H, W, 3)."""
        if self.faults:
            donors_B = self.donors()
            if donors_B is None:
                self.images_BHW3.zero_()
            else:
                for row in self.faults:
                    self.pixels_BHW3[row] = self.pixels_BHW3[donors_B[row]]
        return self.images_BHW3


class CpuLoader(RecordLoader):
    """Threads that decode on the CPU: libjpeg-turbo runs outside of Python's global lock, so they scale."""

    backend = "cpu"

    def _batches(self, epoch: int, starts: range) -> Generator[Batch, None, None]:
        pinned = self._pinned  # they go on to a GPU
        memory = Recycled((self._plan.batch_size, *self._records.image_size, 3), pinned=pinned)
        drafts = prefetch(
            (_PixelDraft(plan, memory.tensor(), pinned=pinned) for plan in self._plans(epoch, starts)),
            self._decode,
            rows=self._plan.batch_size,
            threads=self._threads,
            ahead=self._ahead,
        )
        with closing(drafts):
            for draft in drafts:
                yield self._finish(draft, draft.patched())

    def _decode(self, draft: _PixelDraft, rows: range) -> None:
        size, part = self._records.image_size, slice(rows.start, rows.stop)
        draft.labels_B[part], images = self._records.image_batch(draft.samples_B[part])
        # A microsecond here is 2% of an image: nothing is indexed that can be gone through.
        for row, encoded, pixels, flip in zip(
            rows, images, draft.pixels_BHW3[part], draft.flips_B[part].tolist(), strict=True
        ):
            try:
                decode_image(encoded, size, out=pixels)
            except DecodeError as error:
                draft.faults[row] = str(error)
                continue
            if draft.drawn is not None:
                apply_(pixels, draft.drawn, row)
            if flip:
                cv2.flip(pixels, 1, dst=pixels)
