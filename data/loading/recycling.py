"""Memory for batches that is used again once nobody holds what lies in it.

Fresh memory costs a page fault for every 4 KiB: a few percent of the time of decoding into it, and a third of that of
making floats of it beside other loaders (docs/experiments.md).
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Recycled:
    """Tensors of one shape; there is memory for as many as were held at a time. Threads may share it."""

    def __init__(self, shape: tuple[int, ...], *, pinned: bool) -> None:
        """pinned: page-locked, which PyTorch recycles by itself."""
        self._shape, self._pinned = shape, pinned
        self._free: deque[bytearray] = deque()

    def tensor(self) -> Tensor:
        """uint8, with whatever lay there. Its memory comes back with the last tensor or array that shares it."""
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray(math.prod(self._shape))
        whole = np.frombuffer(memory, np.uint8)  # all views keep this one, also views of views
        weakref.finalize(whole, self._free.append, memory).atexit = False
        return torch.from_numpy(whole.reshape(self._shape))
