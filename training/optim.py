"""Optimizers for backbone and class centres, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from configs.schema import HeadConfig, OptimConfig
from partial_fc.optim import CentreAdamW, CentreSGD

_ADAMW_BETA2 = 0.999
_POLYNOMIAL_POWER = 2


def build_optimizers(
    backbone: Iterable[nn.Parameter],
    centres: Iterable[nn.Parameter],
    config: OptimConfig,
    head: HeadConfig,
    *,
    seed: int,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """One optimizer for the replicated backbone, one for this rank's class centres, with the same settings.

    seed: of the rounding of bf16 centres. On GPUs the backbone's is a fused one, which leaves everything as it was
    where its `found_inf`, a float32 scalar on the device, is not 0 (torch.amp.GradScaler's protocol).
    """
    weights = list(backbone)
    on_gpu = any(weight.is_cuda for weight in weights)
    fused = True if on_gpu else None  # None: what torch takes by itself
    lr, decay, sphere = config.lr, config.weight_decay, head.on_sphere
    if config.name == "sgd":
        sgd = torch.optim.SGD(weights, lr=lr, momentum=config.momentum, weight_decay=decay, fused=fused)
        sgd.register_load_state_dict_pre_hook(_keep_fused)
        if on_gpu and config.momentum:
            _begin_momentum(sgd)
            sgd.register_load_state_dict_post_hook(_begin_momentum)
        return sgd, CentreSGD(
            centres,
            lr=lr,
            momentum=config.momentum,
            weight_decay=decay,
            on_sphere=sphere,
            catch_up=head.missed_steps == "catch_up",
            seed=seed,
        )
    betas = (config.momentum, _ADAMW_BETA2)
    adamw = torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=decay, fused=fused)
    adamw.register_load_state_dict_pre_hook(_keep_fused)
    return adamw, CentreAdamW(centres, lr=lr, betas=betas, weight_decay=decay, on_sphere=sphere, seed=seed)


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint says whether the optimizer that wrote it was fused: it may have been on another kind of device."""
    fused = optimizer.defaults["fused"]
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where there is no momentum yet. Fused SGD takes memory as it finds it, to fill it in its first step: were
    that one skipped, the second would take it for momentum."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def learning_rate(
    step: int, *, total_steps: int, steps_per_epoch: int, global_batch: int, config: OptimConfig
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then polynomial or cosine decay to 0.

    The peak is config.lr x global_batch / config.reference_batch (linear scaling), or config.lr itself when
    reference_batch is 0.
    """
    peak = config.lr * (global_batch / config.reference_batch if config.reference_batch else 1.0)
    warmup = min(total_steps, round(config.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * float((1 - done) ** _POLYNOMIAL_POWER)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
