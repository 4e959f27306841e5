"""One pass of a backbone forward and back, counted by shapes: nothing is computed, and no memory is taken.

Operators are those of a CPU; where a GPU runs others, their sums are the same. Legend: B images.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from backbones import IMAGE_SIZE, Backbone, build_backbone, normalise_pixels
from training.sharded_units import units_of

_HALF = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}
"""Of autocast; fp16 is counted as bf16, which has its size and which CPUs know."""
_CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward")
_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


class Pass(NamedTuple):
    """Forward and backward of B images together."""

    convolutions: float
    """Flops of convolutions whose groups are wide; a multiplication and an addition are two."""
    products: float
    """Flops of matrix products and attention."""
    moved: float
    """Bytes that all other operators read and write, depthwise convolutions among them: memory is their limit."""
    calls: int
    """Operators that do something: about the kernels of a GPU."""
    kept: int
    """Bytes between forward and backward: what autograd saves, with the rounded weights of autocast, without the
    float32 weights themselves."""
    peak: int
    """Bytes at the highest point, with what lives for a moment; gradients of weights go to their buckets at once."""


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is entered, and of no others that pass through it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.look(func, args, kwargs or {}, out)
        return out

    def look(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Take in what an operator has made: of what it was given, views may come back."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._meet(leaf.untyped_storage())

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


class Tally(Live):
    """And the work of the operators, as `Pass` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.products = self.moved = 0.0
        self.calls = 0

    def look(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        super().look(func, args, kwargs, out)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in read}
        in_place = func._schema.is_mutable
        if made and not in_place and all(tensor.untyped_storage()._cdata in known for tensor in made):
            return  # a view
        self.calls += 1
        name = str(func.overloadpacket)
        if name.startswith(_ATTENTION):
            self.products += _attention_flops(name, args)
        elif name in _CONVOLUTIONS and _is_depthwise(name, args):
            self.moved += _bytes(read) + _bytes(made)
        elif func.overloadpacket in flop_registry:
            flops = float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
            if name in _CONVOLUTIONS:
                self.convolutions += flops
            else:
                self.products += flops
        elif made:
            self.moved += _bytes(read) + _bytes(made)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_depthwise(name: str, args: Any) -> bool:
    """Whether each group of a convolution has a single channel."""
    groups = args[8] if name == "aten.convolution" else args[9]
    channels = (args[0] if name == "aten.convolution" else args[1]).shape[1]
    return bool(groups > 1 and groups == channels)


def _attention_flops(name: str, args: Any) -> float:
    """Two products of (T, d) by (d, T) a head; back five, as these are computed again."""
    query = args[1] if name.endswith("backward") else args[0]
    tokens, each = query.shape[-2:]
    times = 10.0 if name.endswith("backward") else 4.0
    return times * float(math.prod(query.shape[:-2]) * tokens * tokens * each)


@functools.cache
def backbone_pass(name: str, *, embedding_size: int, recompute: float, batch: int, precision: str) -> Pass:
    """Forward and backward in training mode of so many images, as a training step runs them.

    precision: `train.precision`. Raises ValueError for a backbone that is not known, or not countable.
    """
    dtype = _HALF.get(precision)
    with torch.device("meta"):
        backbone = build_backbone(name, embedding_size=embedding_size, recompute=recompute).train()
    saved: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to_empty(device="cpu")
        own = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers())}
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        images_BHW3 = torch.empty(batch, *IMAGE_SIZE, 3, dtype=torch.uint8)
        images_B3HW = images_BHW3.permute(0, 3, 1, 2)  # as loaders give them
        half = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
        with Tally() as tally:
            with saved_tensors_hooks(save, lambda tensor: tensor), half:
                embedding_BD = backbone(normalise_pixels(images_B3HW))
            kept = sum(saved.values())
            embedding_BD.backward(torch.empty_like(embedding_BD))
    return Pass(tally.convolutions, tally.products, tally.moved, tally.calls, kept, tally.peak)


class BackboneSizes(NamedTuple):
    """Numbers of weights, and bytes of buffers."""

    parameters: int
    largest: int
    """Of one parameter."""
    buffers: int
    """Bytes."""
    block: int
    """Of the largest block that is gathered and let go where the backbone is cut (`model.shard`)."""
    whole: int
    """Of what then stays whole from forward to backward."""


@functools.cache
def meta_backbone(name: str, *, embedding_size: int) -> Backbone:
    """Its shapes: no memory is taken. Raises ValueError for a backbone that is not known."""
    with torch.device("meta"):
        return build_backbone(name, embedding_size=embedding_size)


@functools.cache
def backbone_sizes(name: str, *, embedding_size: int) -> BackboneSizes:
    """Raises ValueError for a backbone that is not known."""
    backbone = meta_backbone(name, embedding_size=embedding_size)
    numbers = [p.numel() for p in backbone.parameters()]
    units = [(sum(p.numel() for p in unit.parameters), unit.kept) for unit in units_of(backbone)]
    return BackboneSizes(
        block=max((count for count, kept in units if not kept), default=0),
        whole=sum(count for count, kept in units if kept),
        parameters=sum(numbers),
        largest=max(numbers),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in backbone.buffers()),
    )
