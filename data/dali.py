"""Batches decoded by NVIDIA DALI: by nvJPEG on a GPU, by libjpeg-turbo where there is none. Optional.

DALI ends the whole pipeline at the first image that it cannot decode, and takes silently what libjpeg warns of.
So every image is checked by `data.decode.check_image` before DALI sees it, and the two loaders refuse the same
images; the check costs threads less than half of a decode. Should DALI fail all the same, the batches it holds are
decoded by `decode_image`, the pipeline is built anew, and the log says so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data.base_loader import Draft, RecordLoader
from data.batch import Batch, ImageSource
from data.decode import DecodeError, check_image, decode_image, encode_black
from data.errors import DataError
from data.prefetch import prefetch
from data.sampler import BatchPlan

_log = logging.getLogger(__name__)

_QUEUE = 2
"""Batches that DALI decodes ahead, itself: one in work, one waiting. More gave nothing."""

_FAILURES = 3
"""Failures of DALI without a batch between them that are taken for bad images."""


class DaliUnavailableError(DataError):
    """DALI is not installed, or does not load here."""


class _EncodedDraft(Draft):
    """A draft with its encoded images, views into the record file."""

    def __init__(self, samples_B: npt.NDArray[np.int64], flips_B: npt.NDArray[np.bool_], *, pinned: bool) -> None:
        super().__init__(samples_B, flips_B, pinned=pinned)
        self.encoded_B: list[memoryview] = [memoryview(b"")] * len(samples_B)

    def patch(self, size: tuple[int, int]) -> None:
        """Replace bad rows, by whole images with their flips."""
        if not self.faults:
            return
        donors_B = self.donors()
        if donors_B is None:
            self.encoded_B = [memoryview(encode_black(size))] * len(self.encoded_B)
        else:
            self.encoded_B = [self.encoded_B[row] for row in donors_B]
            self.flips_B = self.flips_B[donors_B]


class _Feed:
    """DALI's source: hands out drafts and remembers them until their pixels are back.

    An error from the drafts ends the source as the last draft does, so that what DALI holds still comes out;
    `failure` keeps it.
    """

    def __init__(self, drafts: Iterator[_EncodedDraft], size: tuple[int, int]) -> None:
        self._drafts, self._size = drafts, size
        self.held: deque[_EncodedDraft] = deque()
        self.failure: Exception | None = None

    def __call__(self) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int32]]:
        try:
            draft = next(self._drafts)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from None
        draft.patch(self._size)
        self.held.append(draft)
        return [np.frombuffer(encoded, np.uint8) for encoded in draft.encoded_B], draft.flips_B.astype(np.int32)


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
    ) -> None:
        """Raises DaliUnavailableError when DALI cannot be imported."""
        super().__init__(records, plan=plan, device=device, threads=threads, prefetch=prefetch, flip=flip)
        try:
            import nvidia.dali  # noqa: PLC0415 - optional, and slow to load
        except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
            raise DaliUnavailableError(
                f"DALI does not load ({error}): install nvidia-dali-cuda130 (the extra 'dali' of this package), or use "
                "data.backend=cpu"
            ) from None
        self._dali: Any = nvidia.dali

    def _batches(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        drafts = prefetch(
            (_EncodedDraft(*plan, pinned=self._pinned) for plan in self._plans(epoch, start_step)),
            self._check,
            rows=self._plan.batch_size,
            threads=self._threads,
            ahead=self._ahead,
        )
        with closing(drafts):
            feed = _Feed(drafts, self._records.image_size)
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
        for row in rows:
            label, draft.encoded_B[row] = self._records.image(int(draft.samples_B[row]))
            draft.labels_B[row] = label
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
            encoded, flip = dali.fn.external_source(source=feed, num_outputs=2, batch=True)
            images = dali.fn.decoders.image(
                encoded,
                device="mixed" if cuda else "cpu",
                output_type=dali.types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # nvJPEG: chroma as libjpeg-turbo makes it
            )
            pipeline.set_outputs(dali.fn.flip(images, horizontal=flip))
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Any) -> Tensor:
        """The next images, uint8 (B, H, W, 3): a copy, as DALI takes its buffer back. StopIteration at the end."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = pipeline.run(stream)
        return from_dlpack(images.as_tensor()).clone()

    def _decode(self, draft: _EncodedDraft) -> Tensor:
        """What DALI would have given, on the CPU."""
        rows = zip(draft.encoded_B, draft.flips_B, strict=True)
        images = [decode_image(encoded, self._records.image_size)[:, :: -1 if flip else 1] for encoded, flip in rows]
        return torch.from_numpy(np.stack(images))
