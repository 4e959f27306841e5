"""What a backbone needs for each image in training, counted from shapes: nothing is computed, and no memory taken.

Legend: B images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from backbones import IMAGE_SIZE, Backbone
from training.plan.counting import Live

_IMAGES = 1 << 20
"""So many that what does not grow with them, as gradients of weights, is of no account."""


class Bytes(NamedTuple):
    """For each image."""

    kept: float
    """Between forward and backward: what autograd saves, without the weights."""
    peak: float
    """At the highest point of forward and backward, with what lives only for a moment."""


def bytes_per_image(make: Callable[[], Backbone], *, dtype: torch.dtype | None = None) -> Bytes:
    """Of forward and backward in training mode. make: builds the backbone. dtype: of autocast, None without it.

    What is there but once, for any number of images, is in it by a millionth.
    """
    with torch.device("meta"):
        backbone = make().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to_empty(device="cpu")
        total = _bytes(backbone, _IMAGES, dtype)
    return Bytes(total.kept / _IMAGES, total.peak / _IMAGES)


def _bytes(backbone: Backbone, B: int, dtype: torch.dtype | None) -> Bytes:
    """Of so many images together."""
    images_B3HW = torch.empty(B, 3, *IMAGE_SIZE)
    own = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers(), images_B3HW)}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with Live() as live, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        with saved_tensors_hooks(save, lambda tensor: tensor):
            embedding_BD = backbone(images_B3HW)
        kept = sum(saved.values())
        embedding_BD.backward(torch.empty_like(embedding_BD))
    return Bytes(kept, live.peak)
