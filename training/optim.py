"""Optimizers for backbone and class centres, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

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

    seed: of the rounding of bf16 centres.
    """
    lr, decay, sphere = config.lr, config.weight_decay, head.on_sphere
    if config.name == "sgd":
        return (
            torch.optim.SGD(backbone, lr=lr, momentum=config.momentum, weight_decay=decay),
            CentreSGD(
                centres,
                lr=lr,
                momentum=config.momentum,
                weight_decay=decay,
                on_sphere=sphere,
                catch_up=head.missed_steps == "catch_up",
                seed=seed,
            ),
        )
    betas = (config.momentum, _ADAMW_BETA2)
    return (
        torch.optim.AdamW(backbone, lr=lr, betas=betas, weight_decay=decay),
        CentreAdamW(centres, lr=lr, betas=betas, weight_decay=decay, on_sphere=sphere, seed=seed),
    )


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
