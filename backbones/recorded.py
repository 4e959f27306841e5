"""A backbone's pass there and back as CUDA graphs: recorded once, then each is one launch.

Legend as `backbones.base.Backbone`'s; P trained parameters.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Recorded:
    """What `record` made, for images of one shape. Every call overwrites what the last one gave."""

    def __init__(self, replay: Callable[..., Tensor], images_B3HW: Tensor, weights_P: tuple[Tensor, ...]) -> None:
        self._replay, self._weights = replay, weights_P
        self._kind = _kind(images_B3HW)

    def takes(self, images_B3HW: Tensor) -> bool:
        return _kind(images_B3HW) == self._kind

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        return self._replay(images_B3HW, *self._weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a copy of the backbone has other weights than the graphs."""
        return type(None), ()


def _kind(images_B3HW: Tensor) -> tuple[object, ...]:
    return images_B3HW.shape, images_B3HW.dtype, images_B3HW.device


@contextlib.contextmanager
def without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes in it leave buffers, in place, and random state as they were."""
    before = [buffer.clone() for buffer in module.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, old in zip(module.buffers(), before, strict=True):
            buffer.copy_(old)


def record(backbone: nn.Module, images_B3HW: Tensor) -> Recorded:
    """Pass images through it, a few times there and back, and record that. Buffers, gradients and random state stay.

    The graphs read weights and change buffers where these lie in memory now: both may be written to, not replaced.
    """
    trained = [(name, weight) for name, weight in backbone.named_parameters() if weight.requires_grad]
    names, weights_P = zip(*trained, strict=True)

    def run(images_B3HW: Tensor, *stand_ins_P: Tensor) -> Tensor:
        return functional_call(backbone, dict(zip(names, stand_ins_P, strict=True)), (images_B3HW,))  # type: ignore[no-any-return]

    # Leaves of their own in the weights' memory. DDP keeps the nodes that add up the weights' own gradients alive, in
    # the default stream, and that stream must not wait for one that is being recorded.
    stand_ins_P = [weight.detach().requires_grad_() for weight in weights_P]
    with without_trace(backbone, images_B3HW.device), warnings.catch_warnings():
        # The stand-ins' nodes are of the stream of the first passes, and join the recording.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        graphs: Any = torch.cuda.make_graphed_callables  # whose overloads take a function's result for any object
        replay = graphs(run, (images_B3HW, *stand_ins_P))
    return Recorded(replay, images_B3HW, weights_P)
