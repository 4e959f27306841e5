"""What the optimizers of class centres share: they walk over tiles, and make each tile's gradient there and then.

Legend: as in `partial_fc.tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partial_fc import kernels
from partial_fc.deferred import Waiting, accept
from partial_fc.rounding import lots, more_lots, stochastic_bf16
from partial_fc.tiles import Tile
from partial_fc.work import CentreWork


class CentreOptimizer(torch.optim.Optimizer):
    """Steps over tiles; what happens to a tile is the subclass's."""

    _MOMENTS: tuple[str, ...] = ()
    """State tensors of the parameter's shape and dtype."""
    found_inf: Tensor | None = None
    """float32 scalar on the device, as torch's fused optimizers have it: where it is not 0, `step` changes no bit of
    centres, moments and rows' counts, and gradients that wait are gone. The kernels read it on the device; without
    them, the host reads it. Rounding's lots count such steps, alike on all ranks."""

    def __init__(self, params: Iterable[nn.Parameter], defaults: dict[str, Any], *, fused: bool, seed: int) -> None:
        self.seed, self._fused = seed, fused
        self._waiting: list[Waiting] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._waiting.append(Waiting())
            accept(p, self._waiting[-1] if self._fused else None)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: copy its state_dict()")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for waiting in self._waiting:
            waiting.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the gradients that wait, and .grad where there is one. Deferred gradients are then gone.

        closure: computes the loss and its gradients first, and its value is returned. Raises CentreGradientError when
        the centres were changed since the loss was computed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        queue = iter(self._waiting)
        for group in self.param_groups:
            for p in group["params"]:
                waiting = next(queue)
                if waiting or p.grad is not None:
                    state: dict[str, Any] = self.state[p]
                    if not state:
                        self._begin(p, state)
                    self._walk(p, state, group, CentreWork(p, list(waiting)))
                    waiting.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for the state of another optimizer."""
        for state in state_dict["state"].values():
            if missing := {"steps", *self._MOMENTS} - state.keys():
                raise ValueError(
                    f"{type(self).__name__}: expected its own state, got one without {min(missing)}: was it saved by "
                    "another optimizer?"
                )
        super().load_state_dict(state_dict)

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["steps"] = 0
        for name in self._MOMENTS:
            state[name] = torch.zeros_like(p)

    def _walk(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], work: CentreWork) -> None:
        key = int(np.random.SeedSequence([self.seed, state["steps"]]).generate_state(1)[0])
        state["steps"] += 1
        if work.by_kernels:
            work.update_by_kernels(self._rule(state, group), key, self.found_inf)
            return
        if self.found_inf is not None and self.found_inf.item():
            return
        tensors = [p, *(state[name] for name in self._MOMENTS)]
        for tile in work.tiles():
            values = [tile.take(tensor, work.subcentres).float() for tensor in tensors]
            self._move(tile, values, state, group, work)
            if p.dtype == torch.bfloat16:
                values = _rounded(values, work.global_rows(tile), key)
            for tensor, value_kD in zip(tensors, values, strict=True):
                tile.put(tensor, value_kD, work.subcentres)

    def _rule(self, state: dict[str, Any], group: dict[str, Any]) -> kernels.Sgd | kernels.AdamW:
        """What the kernels are to do."""
        raise NotImplementedError

    def _move(
        self, tile: Tile, values: list[Tensor], state: dict[str, Any], group: dict[str, Any], work: CentreWork
    ) -> None:
        """Change the tile's centres and moments, float32 (k, D) each, in place."""
        raise NotImplementedError


def _rounded(values: list[Tensor], row_k: Tensor, key: int) -> list[Tensor]:
    """Centres and moments in bf16, each by lots of its own."""
    lots_kD = lots(row_k, values[0].shape[1], key)
    shares = (lots_kD, lots_kD >> 16, more_lots(lots_kD) if len(values) > 2 else lots_kD)
    return [stochastic_bf16(value_kD, share_kD) for value_kD, share_kD in zip(values, shares, strict=False)]
