"""Small networks: one that describes images, and those that are trained, of images for the few decisive runs, of
features for the many.

Legend: B rows, S side of an image, F numbers of a feature, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.PReLU(outputs),
    ]


class SmallCNN(nn.Module):
    """(B, 1, 32, 32) to (B, D), 4 million multiplications an image; the features are what it makes of an image."""

    def __init__(self, *, embedding_size: int) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.body = nn.Sequential(
            *_convolution(1, 24, 2),
            *_convolution(24, 48, 2),
            *_convolution(48, 48, 1),
            *_convolution(48, 96, 2),
            *_convolution(96, 96, 1),
            nn.Flatten(),
        )
        self.neck = nn.Sequential(nn.Dropout(0.2), nn.Linear(96 * 16, embedding_size), nn.BatchNorm1d(embedding_size))

    def convolved(self, x: Tensor) -> Tensor:
        """(B, 1536), what the last convolution gives."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.convolved(x))
        return embedding


def _lean(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class TinyCNN(nn.Module):
    """(B, 1, 32, 32) to (B, D), 2 million multiplications an image, in 0.4 of SmallCNN's time."""

    def __init__(self, *, embedding_size: int) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        body = nn.Sequential(
            *_lean(1, 16, 2), *_lean(16, 32, 2), *_lean(32, 32, 1), *_lean(32, 64, 2), *_lean(64, 64, 1)
        )
        self.body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs
        self.neck = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, embedding_size), nn.BatchNorm1d(embedding_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.body(x.contiguous(memory_format=torch.channels_last)))
        return embedding


class SmallMLP(nn.Module):
    """(B, F) to (B, D)."""

    def __init__(self, *, features: int, embedding_size: int, hidden: int = 256) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.layers = nn.Sequential(
            *(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.PReLU(), nn.Dropout(0.2)),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.PReLU()),
            *(nn.Linear(hidden, embedding_size), nn.BatchNorm1d(embedding_size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.layers(x)
        return embedding


Net = SmallCNN | TinyCNN | SmallMLP
