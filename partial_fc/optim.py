"""Optimizers for class centres: rows that took no part in a step cost nothing and do not move.

With sample_rate < 1 the head's gradient is sparse by rows. A dense optimizer would then walk over all centres,
pull the untouched ones by old momentum and weight decay, and make sampling no faster. These two touch only
the rows of the gradient; a dense gradient touches all, and they then equal torch.optim.SGD and AdamW.
Momentum and decay of an untouched row wait until it is drawn again (lazy: docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def _rows(grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """Row numbers (None: all) and values of a sparse or dense gradient."""
    if not grad.is_sparse:
        return None, grad
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _put(tensor: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        tensor.copy_(values)
    else:
        tensor.index_copy_(0, rows, values)


class CentreSGD(torch.optim.Optimizer):
    """SGD with momentum and L2 decay: v = momentum v + g + decay w; w -= lr v, on the gradient's rows only."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, grad = _rows(p.grad)
                w = _take(p, rows)
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                velocity = state["momentum_buffer"]
                v = _take(velocity, rows).mul(group["momentum"]).add_(grad).add_(w, alpha=group["weight_decay"])
                _put(velocity, rows, v)
                _put(p, rows, w.sub(v, alpha=group["lr"]))


class CentreAdamW(torch.optim.Optimizer):
    """AdamW on the gradient's rows only; each row counts its own steps, so its bias correction is right."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, grad = _rows(p.grad)
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["row_steps"] = p.new_zeros(p.shape[0], 1)
                steps = _take(state["row_steps"], rows) + 1
                mean = _take(state["exp_avg"], rows).mul(beta1).add_(grad, alpha=1 - beta1)
                square = _take(state["exp_avg_sq"], rows).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
                _put(state["row_steps"], rows, steps)
                _put(state["exp_avg"], rows, mean)
                _put(state["exp_avg_sq"], rows, square)
                root = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                w = _take(p, rows).mul(1 - group["lr"] * group["weight_decay"])
                _put(p, rows, w.sub_(group["lr"] * (mean / (1 - beta1**steps)) / root))
