"""Half precision: the backbone's gradients are made that much larger that they do not vanish on their way.

As torch.amp.GradScaler does it, but for one gradient in the middle of the network: the head works in float32, so the
factor comes in where its gradient enters the backbone, and a loss is never scaled. Whether a step overflowed is not
read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

_START, _LEAST = 2.0**16, 1.0
_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000
"""GradScaler's."""


class LossScale:
    """The factor, a float32 scalar on the device. Doubled after 2000 steps without an overflow, halved by each."""

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), _START, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, self.factor.reciprocal())

    def update(self, overflow: Tensor) -> Tensor:
        """Move the factor by what the step showed. overflow: float32 scalar, 1 where gradients were not finite.

        Returns a float32 scalar: 1 where they were although the factor is as low as it gets, so that something else
        is wrong.
        """
        fault = overflow * (self.factor <= _LEAST)
        torch._amp_update_scale_(self.factor, self._steps, overflow, _GROWTH, _BACKOFF, _INTERVAL)
        self.factor.clamp_(min=_LEAST)
        return fault

    def state_dict(self) -> dict[str, float]:
        """Waits for the GPU."""
        return {"factor": self.factor.item(), "steps": self._steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.factor.fill_(state["factor"])
        self._steps.fill_(state["steps"])
