"""Batches decoded by NVIDIA DALI: by nvJPEG on a GPU, by libjpeg-turbo where there is none. Optional.

DALI ends the whole pipeline at the first image that it cannot decode, and takes silently what libjpeg warns of.
So every image is checked by `data.loading.decode.check_image` before DALI sees it, and the two loaders refuse the same
images; the check costs threads less than half of a decode. Should DALI fail all the same, the batches it holds are
decoded by `decode_image`, the pipeline is built anew, and the log says so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from configs.augment import AugmentConfig
from data.errors import DataError
from data.loading.augment import Augment, Drawn, apply_
from data.loading.base_loader import Draft, Planned, RecordLoader
from data.loading.batch import Batch, ImageSource
from data.loading.decode import DecodeError, check_image, decode_image, encode_black
from data.loading.prefetch import prefetch
from data.order.sampler import BatchPlan

_log = logging.getLogger(__name__)

_QUEUE = 2
"""Batches that DALI decodes ahead, itself: one in work, one waiting. More gave nothing."""

_FAILURES = 3
"""Failures of DALI without a batch between them that are taken for bad images."""


class DaliUnavailableError(DataError):
    """DALI is not installed, or does not load here."""


class _EncodedDraft(Draft):
    """A draft with its encoded images, views into the record file."""

    def __init__(self, plan: Planned, *, pinned: bool) -> None:
        super().__init__(plan, pinned=pinned)
        self.encoded_B: list[memoryview] = [memoryview(b"")] * len(self.samples_B)

    def patch(self, size: tuple[int, int]) -> None:
        """Replace bad rows, by whole images with their flips and what was drawn of them."""
        if not self.faults:
            return
        donors_B = self.donors()
        if donors_B is None:
            self.encoded_B = [memoryview(encode_black(size))] * len(self.encoded_B)
            self.drawn = self.drawn and Drawn.nothing(len(self.encoded_B), size)
        else:
            self.encoded_B = [self.encoded_B[row] for row in donors_B]
            self.flips_B = self.flips_B[donors_B]
            self.drawn = self.drawn and self.drawn.take(donors_B)


class _Feed:
    """DALI's source: hands out drafts and remembers them until their pixels are back.

    An error from the drafts ends the source as the last draft does, so that what DALI holds still comes out;
    `failure` keeps it.
    """

    def __init__(self, drafts: Iterator[_EncodedDraft], size: tuple[int, int], augment: Augment) -> None:
        self._drafts, self._size, self._augment = drafts, size, augment
        self.held: deque[_EncodedDraft] = deque()
        self.failure: Exception | None = None

    def __call__(self) -> tuple[Any, ...]:
        """Encoded images, flips, and with augmentation what was drawn."""
        try:
            draft = next(self._drafts)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from None
        draft.patch(self._size)
        self.held.append(draft)
        encoded_B = [np.frombuffer(encoded, np.uint8) for encoded in draft.encoded_B]
        return (
            encoded_B,
            draft.flips_B.astype(np.int32),
            *([] if draft.drawn is None else _arguments(draft.drawn, self._augment)),
        )


class DaliLoader(RecordLoader):
    """A DALI pipeline fed from the record reader; each epoch has a pipeline of its own."""

    backend = "dali"

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
        """Raises DaliUnavailableError when DALI cannot be imported."""
        super().__init__(
            records, plan=plan, device=device, threads=threads, prefetch=prefetch, flip=flip, augment=augment
        )
        try:
            import nvidia.dali  # noqa: PLC0415 - optional, and slow to load
        except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
            raise DaliUnavailableError(
                f"DALI does not load ({error}): install nvidia-dali-cuda130 (the extra 'dali' of this package), or use "
                "data.backend=cpu"
            ) from None
        self._dali: Any = nvidia.dali

    def _batches(self, epoch: int, starts: range) -> Generator[Batch, None, None]:
        drafts = prefetch(
            (_EncodedDraft(plan, pinned=self._pinned) for plan in self._plans(epoch, starts)),
            self._check,
            rows=self._plan.batch_size,
            threads=self._threads,
            ahead=self._ahead,
        )
        with closing(drafts):
            feed = _Feed(drafts, self._records.image_size, self._augment)
            pipeline = self._pipeline(feed)
            failures = 0
            while True:
                try:
                    images_BHW3 = self._run(pipeline)
                except StopIteration:
                    break
                except RuntimeError as error:
                    failures += 1
                    if not feed.held or failures > _FAILURES:
                        raise  # not about any image
                    reason = " ".join(str(error).split())
                    _log.warning("DALI failed, %d batches are decoded on the CPU: %s", len(feed.held), reason)
                    while feed.held:
                        draft = feed.held.popleft()
                        yield self._finish(draft, self._decode(draft))
                    pipeline = self._pipeline(feed)
                else:
                    failures = 0
                    yield self._finish(feed.held.popleft(), images_BHW3)
            if feed.failure is not None:
                raise feed.failure

    def _check(self, draft: _EncodedDraft, rows: range) -> None:
        part = slice(rows.start, rows.stop)
        draft.labels_B[part], draft.encoded_B[part] = self._records.image_batch(draft.samples_B[part])
        for row in rows:
            try:
                check_image(draft.encoded_B[row], self._records.image_size)
            except DecodeError as error:
                draft.faults[row] = str(error)

    def _pipeline(self, feed: _Feed) -> Any:
        dali, cuda = self._dali, self._device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._plan.batch_size,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if cuda and self._device.index is None else self._device.index,
            prefetch_queue_depth=_QUEUE,
        )
        with pipeline:
            arguments = _arguments(Drawn.nothing(1, self._records.image_size), self._augment)
            encoded, flip, *drawn = dali.fn.external_source(source=feed, num_outputs=2 + len(arguments), batch=True)
            images = dali.fn.decoders.image(
                encoded,
                device="mixed" if cuda else "cpu",
                output_type=dali.types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # nvJPEG: chroma as libjpeg-turbo makes it
            )
            images = self._augmented(images, drawn)
            pipeline.set_outputs(dali.fn.flip(images, horizontal=flip))
        pipeline.build()
        return pipeline

    def _augmented(self, images: Any, drawn: Sequence[Any]) -> Any:
        """`data.loading.augment.apply_` by DALI's operators. drawn: what `_arguments` gives."""
        fn, types, augment = self._dali.fn, self._dali.types, self._augment
        left = iter(drawn)
        if augment.colours:
            images = fn.coord_transform(images, M=next(left), T=next(left), dtype=types.UINT8)
            images = fn.reshape(images, layout="HWC")  # which coordinates do not have
        if augment.shrinks:
            for size in (next(left), list(self._records.image_size)):
                images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if augment.blurs:
            images = fn.gaussian_blur(images, sigma=next(left), window_size=next(left))
        if augment.covers:
            images = fn.erase(images, anchor=next(left), shape=next(left), axis_names="HW", fill_value=0)
        return images

    def _run(self, pipeline: Any) -> Tensor:
        """The next images, uint8 (B, H, W, 3): a copy, as DALI takes its buffer back. StopIteration at the end."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = pipeline.run(stream)
        return from_dlpack(images.as_tensor()).clone()

    def _decode(self, draft: _EncodedDraft) -> Tensor:
        """What DALI would have given, on the CPU."""
        images = []
        for row, encoded in enumerate(draft.encoded_B):
            pixels = decode_image(encoded, self._records.image_size)
            if draft.drawn is not None:
                apply_(pixels, draft.drawn, row)
            images.append(pixels[:, :: -1 if draft.flips_B[row] else 1])
        return torch.from_numpy(np.stack(images))


def _arguments(drawn: Drawn, augment: Augment) -> list[npt.NDArray[Any]]:
    """Of the operators that the run needs, as they take them; a blur of nothing is one by a kernel of one pixel."""
    found: list[npt.NDArray[Any]] = []
    if augment.colours:
        found += [drawn.matrix_B33, drawn.shift_B3]
    if augment.shrinks:
        found.append(drawn.sides_B2.astype(np.float32))
    if augment.blurs:
        found += [np.where(drawn.sigma_B > 0, drawn.sigma_B, np.float32(1)), drawn.windows_B]
    if augment.covers:
        boxes_BK4 = drawn.boxes_BK4.astype(np.float32)
        found += [boxes_BK4[:, :, part].reshape(len(boxes_BK4), -1) for part in (slice(2), slice(2, 4))]
    return found
