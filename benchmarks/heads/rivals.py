"""Fused linear cross-entropies of others, where they are installed and a GPU is there: cut-cross-entropy and Liger.

Both know no margin and no unit rows. They get unit rows, the embeddings times s, in bf16, and train a plain softmax:
less work than the heads they stand beside. Settings are their defaults, cut-cross-entropy's gradient filter among them.

Legend: B rows of the batch, D embedding size, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RivalLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BD, w_CD, labels_B), both bf16, to a scalar."""


def _cut_cross_entropy(module: Any) -> RivalLoss:
    def loss(x_BD: Tensor, w_CD: Tensor, labels_B: Tensor) -> Tensor:
        value: Tensor = module.linear_cross_entropy(x_BD, w_CD, labels_B)
        return value

    return loss


def _liger(module: Any) -> RivalLoss:
    fused = module.LigerFusedLinearCrossEntropyLoss()

    def loss(x_BD: Tensor, w_CD: Tensor, labels_B: Tensor) -> Tensor:
        value: Tensor = fused(w_CD, x_BD, labels_B)
        return value

    return loss


_KNOWN: dict[str, tuple[str, Callable[[Any], RivalLoss]]] = {
    "cut-cross-entropy": ("cut_cross_entropy", _cut_cross_entropy),
    "Liger": ("liger_kernel.transformers", _liger),
}
RIVALS = tuple(_KNOWN)


def load_rivals(device: torch.device) -> tuple[dict[str, RivalLoss], dict[str, str]]:
    """Losses by name, and for the others why they are left out."""
    losses: dict[str, RivalLoss] = {}
    left_out: dict[str, str] = {}
    for name, (module, build) in _KNOWN.items():
        if device.type != "cuda":
            left_out[name] = "it needs a GPU"
            continue
        try:
            losses[name] = build(importlib.import_module(module))
        except ImportError as error:
            left_out[name] = f"import {module}: {error}"
    return losses, left_out


def rival_margin_free_loss(loss: RivalLoss, x_BD: Tensor, w_CD: Tensor, labels_B: Tensor, scale: float) -> Tensor:
    """Mean softmax loss of float32 rows, by way of unit rows in bf16."""
    x = (scale * F.normalize(x_BD)).bfloat16()
    return loss(x, F.normalize(w_CD).bfloat16(), labels_B)
