"""Optimizers for class centres: what took no part in a step costs nothing, and no gradient array is ever made.

Both read, change and write a tile of centres at a time, and make the tile's gradient there and then
(`partial_fc.deferred`). Of sampled classes they touch the rows that took part and no others; over all classes they
equal torch.optim.SGD and AdamW. What becomes of the rows not touched: docs/numerics.md.

Legend: as in `partial_fc.tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc import kernels
from partial_fc.catch_up import MissedSteps
from partial_fc.centre_optimizer import CentreOptimizer
from partial_fc.tiles import MIN_NORM, Tile
from partial_fc.work import CentreWork

_TINY = 1e-30  # in place of a beta of 0


def _check(*momenta: float, **numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    for momentum in momenta:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum, betas: expected 0 to below 1, got {momentum}")


class CentreSGD(CentreOptimizer):
    """SGD with momentum and L2 decay: v = momentum v + g + decay w; w -= lr v.

    fused: make the head's gradients while applying them. They are then never in .grad: clear them by this optimizer's
    zero_grad (a step does so too), not the module's; clipping and GradScaler see nothing of them. Gradients of other
    losses are taken from .grad, of sampled classes only the rows that were sampled. False: take all from .grad.
    on_sphere: v keeps to the tangent space of its centre, v = momentum (v less its part along w) + g, and the centre
    its length; decay then has no meaning and is left out. catch_up: rows that were not drawn are brought to where
    momentum and decay alone would have taken them when they are drawn again; `settle` does so for all. bf16 centres
    have a bf16 momentum, both rounded by lot; seed: of that.
    """

    _MOMENTS = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        fused: bool = True,
        on_sphere: bool = False,
        catch_up: bool = False,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for catch_up with on_sphere, where steps are not linear, or with bf16 centres, and for
        numbers out of range."""
        _check(momentum, lr=lr, weight_decay=weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, fused=fused, seed=seed)
        self.on_sphere, self.catch_up = on_sphere, catch_up
        self._missed: dict[Tensor, MissedSteps] = {}
        kinds = {p.dtype for p in self._parameters()}
        if catch_up and (on_sphere or torch.bfloat16 in kinds):
            raise ValueError("catch_up: expected centres in float32 that do not move on the sphere")

    def settle(self) -> None:
        """With catch_up: bring every row up to date, before centres are saved or read as a whole."""
        for missed in self._missed.values():
            missed.settle()

    def state_dict(self) -> dict[str, Any]:
        """Settles first, so that no table of missed steps need be saved."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._missed.clear()
        for p, state in self.state.items():
            if self.catch_up:
                self._missed[p] = MissedSteps(p, state["momentum_buffer"])

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super()._begin(p, state)
        if self.catch_up:
            self._missed[p] = MissedSteps(p, state["momentum_buffer"])

    def _walk(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], work: CentreWork) -> None:
        super()._walk(p, state, group, work)
        if p in self._missed:
            self._missed[p].after_step(
                list(work.tiles()),
                work.subcentres,
                everything=work.sampled is None,
                lr=group["lr"],
                momentum=group["momentum"],
                decay=group["weight_decay"],
                skip=self.found_inf,
            )

    def _rule(self, state: dict[str, Any], group: dict[str, Any]) -> kernels.Sgd:
        return kernels.Sgd(
            velocity_CD=state["momentum_buffer"],
            lr=group["lr"],
            momentum=group["momentum"],
            decay=group["weight_decay"],
            on_sphere=self.on_sphere,
        )

    def _move(
        self, tile: Tile, values: list[Tensor], state: dict[str, Any], group: dict[str, Any], work: CentreWork
    ) -> None:
        w_kD, v_kD = values
        lr, momentum = group["lr"], group["momentum"]
        if self.on_sphere:
            _make_tangent_(v_kD, w_kD)
        radial_k1 = work.add_(tile, w_kD, v_kD, momentum)
        if self.on_sphere:
            v_kD.addcmul_(w_kD, radial_k1, value=-1)
            _move_on_sphere_(w_kD, lr * v_kD)
        else:
            v_kD.addcmul_(w_kD, group["weight_decay"] - radial_k1)
            w_kD.sub_(v_kD, alpha=lr)


class CentreAdamW(CentreOptimizer):
    """AdamW; each row counts its own steps, so that its bias correction is right. Settings as in `CentreSGD`.

    on_sphere: the step itself is made tangent, and the centre keeps its length; decay is left out.
    """

    _MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        fused: bool = True,
        on_sphere: bool = False,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for numbers out of range."""
        _check(*betas, lr=lr, weight_decay=weight_decay, eps=eps)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, fused=fused, seed=seed)
        self.on_sphere = on_sphere

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super()._begin(p, state)
        state["row_steps"] = torch.zeros(p.shape[0], 1, dtype=torch.float32, device=p.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch gives all state the parameter's dtype; bf16 would count no further than 256.
        saved = {i: s["row_steps"] for i, s in state_dict["state"].items()}
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._parameters(), strict=True):
            if i in saved:
                self.state[p]["row_steps"] = saved[i].to(p.device, torch.float32, copy=True)

    def _rule(self, state: dict[str, Any], group: dict[str, Any]) -> kernels.AdamW:
        return kernels.AdamW(
            mean_CD=state["exp_avg"],
            square_CD=state["exp_avg_sq"],
            row_steps_C1=state["row_steps"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
            on_sphere=self.on_sphere,
        )

    def _move(
        self, tile: Tile, values: list[Tensor], state: dict[str, Any], group: dict[str, Any], work: CentreWork
    ) -> None:
        w_kD, mean_kD, square_kD = values
        beta1, beta2 = group["betas"]
        steps_k1 = tile.take(state["row_steps"], work.subcentres) + 1
        tile.put(state["row_steps"], steps_k1, work.subcentres)
        d_kD = torch.zeros_like(w_kD)
        radial_k1 = work.add_(tile, w_kD, d_kD, 0.0)
        d_kD.addcmul_(w_kD, radial_k1, value=-1)
        mean_kD.lerp_(d_kD, 1 - beta1)
        square_kD.mul_(beta2).addcmul_(d_kD, d_kD, value=1 - beta2)
        # 1 - beta^k by way of expm1: 1 - 0.999 has lost three digits in float32.
        bias1_k1, bias2_k1 = (-torch.expm1(steps_k1 * math.log(max(beta, _TINY))) for beta in (beta1, beta2))
        root_kD = torch.div(square_kD, bias2_k1, out=d_kD).sqrt_().add_(group["eps"]).mul_(bias1_k1)
        if self.on_sphere:
            step_kD = torch.div(mean_kD, root_kD, out=root_kD).mul_(group["lr"])
            _move_on_sphere_(w_kD, _make_tangent_(step_kD, w_kD))
        else:
            w_kD.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean_kD, root_kD, value=-group["lr"])


def _make_tangent_(v_kD: Tensor, w_kD: Tensor) -> Tensor:
    """Take out what lies along w."""
    along_k1 = (v_kD * w_kD).sum(1, keepdim=True) / w_kD.square().sum(1, keepdim=True).clamp_min(MIN_NORM**2)
    return v_kD.addcmul_(w_kD, along_k1, value=-1)


def _move_on_sphere_(w_kD: Tensor, step_kD: Tensor) -> None:
    """w -= step, its length kept."""
    length_k1 = torch.linalg.vector_norm(w_kD, dim=1, keepdim=True)
    w_kD.sub_(step_kD)
    w_kD.mul_(length_k1 / torch.linalg.vector_norm(w_kD, dim=1, keepdim=True).clamp_min_(MIN_NORM))
