"""Embeddings of images for evaluation: image and mirror image, in batches, cut over the ranks of a group.

Legend: N images, W ranks, S images of the longest rank, B batch, D components of an embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import IMAGE_SIZE, Backbone, normalise_pixels
from data.errors import DataError
from data.loading.decode import decode_image
from sharding import all_shards, shard_of

# torch 2.13 renamed it; older builds on a GPU host may only know the former name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Images = Sequence[bytes] | npt.NDArray[np.uint8]
"""N encoded images (JPEG or PNG), or RGB pixels uint8 (N, 112, 112, 3)."""


def embed_images(
    backbone: Backbone,
    images: Images,
    *,
    batch_size: int,
    group: dist.ProcessGroup | None = None,
    each: Callable[[], None] | None = None,
) -> Tensor:
    """Sum of the embeddings of each image and of its mirror image, float32 (N, D), on the backbone's device.

    With a group, rank r embeds the images of `shard_of(r, W, N)` and one all-gather gives all of them to every rank.
    All ranks must pass the same images, and hold the same weights and BatchNorm statistics, which differ between ranks
    while they train: broadcast the buffers before. Runs in evaluation mode without gradients and restores
    every module's mode. each: called before each batch, as often on every rank; it may raise, on all ranks alike, to
    end the work. For bf16, call it under autocast. Mirror images are a batch of their own.

    Raises DataError, on every rank alike, for an image that does not decode; ValueError for anything that is not
    images, or a batch size below 1.
    """
    _check(images, batch_size)
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    mine = shard_of(rank, world_size, len(images))
    device = next(backbone.parameters()).device
    # One row beside the longest shard: the number of this rank's first bad image plus one, or zero.
    longest = shard_of(0, world_size, len(images)).size
    packed_SD = torch.zeros(longest + 1, backbone.embedding_size, device=device)
    bad = 0
    with _evaluating(backbone), torch.no_grad():
        for place in range(0, longest, batch_size):
            if each is not None:
                each()
            start, stop = mine.start + place, min(mine.start + place + batch_size, mine.stop)
            if bad or start >= stop:  # another rank may have an image more
                continue
            try:
                x_B3HW = _pixels(images, start, stop, device)
            except _BadImageError as error:
                bad = error.number + 1
                continue
            packed_SD[start - mine.start : stop - mine.start] = backbone(x_B3HW) + backbone(x_B3HW.flip(-1))
    packed_SD[-1, 0] = bad
    if group is None:
        gathered_WSD = packed_SD[None]
    else:
        gathered_WSD = packed_SD.new_empty(world_size, *packed_SD.shape)
        _all_gather(gathered_WSD.flatten(0, 1), packed_SD, group=group)
    _refuse_bad(images, gathered_WSD[:, -1, 0])
    shards = all_shards(world_size, len(images))
    return torch.cat([gathered_WSD[owner, : shard.size] for owner, shard in enumerate(shards)])


class _BadImageError(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _check(images: Images, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if len(images) == 0:
        raise ValueError("expected at least one image, got none")
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.shape[1:] != (*IMAGE_SIZE, 3):
            expected = (len(images), *IMAGE_SIZE, 3)
            raise ValueError(f"expected RGB pixels uint8 {expected}, got {images.dtype} of shape {images.shape}")
        return
    # All of them, not this rank's: every rank refuses, and none waits for the others.
    items: Sequence[object] = images
    for number, image in enumerate(items):
        if not isinstance(image, bytes | bytearray | memoryview):
            kind = type(image).__name__
            raise ValueError(f"image {number}: expected encoded bytes, got {kind}: pass pixels as one array")


def _pixels(images: Images, start: int, stop: int, device: torch.device) -> Tensor:
    """Images start … stop - 1 as the backbone takes them, channels last in memory."""
    if isinstance(images, np.ndarray):
        # A copy, as torch cannot take arrays that are read-only (a mapped file) or run backwards.
        pixels_BHW3 = torch.from_numpy(np.array(images[start:stop], order="C"))
    else:
        pixels_BHW3 = torch.empty(stop - start, *IMAGE_SIZE, 3, dtype=torch.uint8)
        into = pixels_BHW3.numpy()
        for row, number in enumerate(range(start, stop)):
            try:
                decode_image(images[number], IMAGE_SIZE, out=into[row])
            except DataError:
                raise _BadImageError(number) from None
    if device.type == "cuda":  # pinned, so that the copy does not wait and decoding goes on beside the GPU
        pixels_BHW3 = pixels_BHW3.pin_memory().to(device, non_blocking=True)
    return normalise_pixels(pixels_BHW3.permute(0, 3, 1, 2))


def _refuse_bad(images: Images, bad_W: Tensor) -> None:
    """Raise the same error on every rank, so that none waits in a later collective for one that has given up.

    float32 counts exactly up to 2^24 images.
    """
    numbers = [int(number) - 1 for number in bad_W.tolist() if number]
    if numbers:
        try:
            decode_image(images[numbers[0]], IMAGE_SIZE)
        except DataError as error:
            raise DataError(f"image {numbers[0]} of {len(images)}: {error}") from None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode: frozen parts of a training model stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
