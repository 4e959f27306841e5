"""What a backbone needs for each image in training, counted from shapes: nothing is computed, and no memory taken.

Legend: B images.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import IMAGE_SIZE, Backbone

_IMAGES = 1 << 20
"""So many that what does not grow with them, as gradients of weights, is of no account."""


class Bytes(NamedTuple):
    """For each image."""

    kept: float
    """Between forward and backward: what autograd saves, without the weights."""
    peak: float
    """At the highest point of forward and backward, with what lives only for a moment."""


class _Live(TorchDispatchMode):
    """Follows the memory of all tensors that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


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

    with _Live() as live, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        with saved_tensors_hooks(save, lambda tensor: tensor):
            embedding_BD = backbone(images_B3HW)
        kept = sum(saved.values())
        embedding_BD.backward(torch.empty_like(embedding_BD))
    return Bytes(kept, live.peak)
