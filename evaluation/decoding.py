"""Images decoded by threads, a batch at a time, those that are damaged marked.

Legend: B images of a batch, H, W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import torch

from backbones import IMAGE_SIZE
from data.loading.decode import DecodeError, Pixels
from data.loading.prefetch import prefetch
from data.rec.recordio import RecordError

_AHEAD = 2


class Draft:
    """Room for one batch; filled when it is handed out."""

    def __init__(self, samples: Sequence[int], *, pinned: bool) -> None:
        self.samples = samples
        """Numbers of its images."""
        self.images_BHW3 = torch.zeros(len(samples), *IMAGE_SIZE, 3, dtype=torch.uint8, pin_memory=pinned)
        self.pixels_BHW3 = self.images_BHW3.numpy()
        """The same memory. Of a damaged image it may hold anything."""
        self.bad_B = np.zeros(len(samples), dtype=bool)


def decoded(
    decode: Callable[[int, Pixels], None],
    batches: Iterable[Sequence[int]],
    *,
    batch_size: int,
    threads: int,
    pinned: bool = False,
) -> Generator[Draft, None, None]:
    """Batches in their order, while later ones are being decoded.

    decode: writes the pixels of an image, by its number, to (H, W, 3); threads call it at once. Where it raises
    DecodeError or RecordError the image is marked; what else it raises, as where a disk or a store does not give it,
    ends the work. batches: numbers of images, at most batch_size each. pinned: into memory that a GPU copies from.
    """

    def fill(draft: Draft, rows: range) -> None:
        for row in rows[: max(0, len(draft.samples) - rows.start)]:
            try:
                decode(int(draft.samples[row]), draft.pixels_BHW3[row])
            except (DecodeError, RecordError):
                draft.bad_B[row] = True

    drafts = (Draft(samples, pinned=pinned) for samples in batches)
    with contextlib.closing(prefetch(drafts, fill, rows=batch_size, threads=threads, ahead=_AHEAD)) as filled:
        yield from filled
