"""Buffers that a forward pass changes, put back where the step turns out not to be finite: no host waits for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Undo:
    """Buffers of some modules (BatchNorm's statistics, AdaFace's, CurricularFace's) as they were before a step.

    The buffers become views of one tensor for each dtype, so that `save` and `restore` are a launch each for a dtype,
    however many there are. Names, shapes and values stay; state_dict and load_state_dict (which copies in place) work
    as before. Build it once the modules are on their device, and leave their buffers' tensors alone.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        places: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
        for module in (part for root in modules for part in root.modules()):
            for name, buffer in module.named_buffers(recurse=False):
                places.setdefault(buffer.dtype, []).append((module, name, buffer))
        self._flat: list[Tensor] = []
        for found in places.values():
            flat = torch.cat([buffer.flatten() for _, _, buffer in found])
            parts = flat.split([buffer.numel() for _, _, buffer in found])
            for (module, name, buffer), part in zip(found, parts, strict=True):
                # .data: a version counter of its own. BatchNorm's backward checks that its buffers have not been
                # changed since its forward, and views would count their neighbours' changes as their own.
                setattr(module, name, part.view(buffer.shape).data)
            self._flat.append(flat)
        self._saved = [torch.empty_like(flat) for flat in self._flat]

    @torch.no_grad()
    def save(self) -> None:
        for saved, flat in zip(self._saved, self._flat, strict=True):
            saved.copy_(flat)

    @torch.no_grad()
    def restore(self, wanted: Tensor) -> None:
        """Where `wanted`, a scalar on the device, is not 0, every buffer gets the bits it had at `save`."""
        for saved, flat in zip(self._saved, self._flat, strict=True):
            torch.where(wanted != 0, saved, flat, out=flat)
