"""Margin softmax over class centres sharded across ranks (Partial FC); `PartialFC` is for loops of one's own."""

from __future__ import annotations

from partial_fc.choice import KernelFallbackWarning
from partial_fc.head import HeadStateError
from partial_fc.module import PartialFC, PartialFCInputError
from partial_fc.optim import CentreAdamW, CentreSGD
from partial_fc.work import CentreGradientError

__all__ = [
    "CentreAdamW",
    "CentreGradientError",
    "CentreSGD",
    "HeadStateError",
    "KernelFallbackWarning",
    "PartialFC",
    "PartialFCInputError",
]
