"""MobileFaceNet (arXiv 1804.07573), a network for phones, with the peers' widths and state dict keys.

Architecture: table 1 of the paper (inverted residuals of MobileNetV2 with PReLU, and a depthwise convolution over all
7 x 7 places instead of their mean) at twice its width, and with a second convolution of two channels a group: that is
what insightface trains as `mbf`, whose weights load unchanged. 0.44 GMAC an image.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from backbones.base import FINAL_SIZE, Backbone, init_he
from backbones.recompute import Part


class _Stage(NamedTuple):
    """A strided bottleneck and the residual bottlenecks after it."""

    width: int
    expanded: int
    """Channels of the strided bottleneck's depthwise convolution."""
    residuals: int
    residual_expanded: int


_STEM_WIDTH = 128
_STAGES = (_Stage(128, 128, 4, 128), _Stage(256, 256, 6, 256), _Stage(256, 512, 2, 256))
_FINAL_WIDTH = 512


class _Layers(nn.Module):
    """A sequence; the attribute's name is part of the peers' keys."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)  # type: ignore[no-any-return]


class _Residual(_Layers):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.layers(x_BCHW)  # type: ignore[no-any-return]


def _linear(width_in: int, width: int, size: int, *, stride: int = 1, padding: int = 0, groups: int = 1) -> _Layers:
    """Convolution and BN, without an activation."""
    conv = nn.Conv2d(width_in, width, size, stride=stride, padding=padding, groups=groups, bias=False)
    return _Layers(conv, nn.BatchNorm2d(width))


def _conv(width_in: int, width: int, size: int, *, stride: int = 1, groups: int = 1) -> _Layers:
    """Convolution, BN and PReLU."""
    linear = _linear(width_in, width, size, stride=stride, padding=size // 2, groups=groups)
    return _Layers(*linear.layers, nn.PReLU(width))


def _bottleneck(width_in: int, width: int, expanded: int, *, stride: int) -> tuple[nn.Module, ...]:
    """1x1 to `expanded` channels, 3x3 on each alone, 1x1 to `width` without an activation."""
    return (
        _conv(width_in, expanded, 1),
        _conv(expanded, expanded, 3, stride=stride, groups=expanded),
        _linear(expanded, width, 1),
    )


class MobileFaceNet(Backbone):
    """MobileFaceNet at twice the paper's width."""

    def __init__(self, *, embedding_size: int) -> None:
        super().__init__(embedding_size=embedding_size)
        layers: list[nn.Module] = [
            _conv(3, _STEM_WIDTH, 3, stride=2),
            _conv(_STEM_WIDTH, _STEM_WIDTH, 3, groups=_STEM_WIDTH // 2),
        ]
        width = _STEM_WIDTH
        for stage in _STAGES:
            layers.append(_Layers(*_bottleneck(width, stage.width, stage.expanded, stride=2)))
            width = stage.width
            residuals = (_bottleneck(width, width, stage.residual_expanded, stride=1) for _ in range(stage.residuals))
            layers.append(_Layers(*(_Residual(*parts) for parts in residuals)))
        self.layers = nn.Sequential(*layers)
        self.conv_sep = _conv(width, _FINAL_WIDTH, 1)
        self.features = _Layers(
            _linear(_FINAL_WIDTH, _FINAL_WIDTH, FINAL_SIZE, groups=_FINAL_WIDTH),
            nn.Flatten(),
            nn.Linear(_FINAL_WIDTH, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        init_he(self)

    def body(self, images_B3HW: Tensor) -> Tensor:
        return self.conv_sep(self.layers(images_B3HW))  # type: ignore[no-any-return]

    def parts(self) -> list[Part]:
        found: list[Part] = []
        for part in self.layers:
            residuals = [Part(residual) for residual in part.modules() if isinstance(residual, _Residual)]
            found += residuals or [Part(part)]
        return found

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.features(features_BCHW)  # type: ignore[no-any-return]
