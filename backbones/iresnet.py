"""IResNet: the residual network that ArcFace made the field's standard, with the peers' state dict keys.

Architecture: ArcFace (arXiv 1801.07698), section 3.2: blocks BN-Conv-BN-PReLU-Conv-BN after D. Han et al.
(arXiv 1610.02915), a first convolution that keeps the 112 x 112 pixels, and the embedding by BN-Dropout-FC-BN.
Weights of insightface's `iresnet*` load unchanged.
"""

from __future__ import annotations

from torch import Tensor, nn

from backbones.base import FINAL_SIZE, Backbone
from backbones.recompute import Part

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
"""Blocks of each of the four stages, by depth."""

_STEM_WIDTH = 64
_WIDTHS = (64, 128, 256, 512)

_STD = 0.1
"""Of a convolution's first weights, as the peers': BN hides it from the output, but their learning rates go with it."""


def _init(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Weights of a convolution and the statistics of the BN behind it.

    The variance that these weights give to unit-variance inputs: training replaces it, but the untrained network's
    evaluation stays finite with it, which at the usual 1 overflows from a depth of 100 on.
    """
    nn.init.normal_(conv.weight, std=_STD)
    assert bn.running_var is not None  # for the type checker: None only in a BN that tracks no statistics
    nn.init.constant_(bn.running_var, _STD**2 * conv.weight[0].numel())


class _Block(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 (strided), BN, plus the input, projected where shapes differ."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            projection = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            projected_bn = nn.BatchNorm2d(width)
            _init(projection, projected_bn)
            self.downsample = nn.Sequential(projection, projected_bn)
        _init(self.conv1, self.bn2)
        _init(self.conv2, self.bn3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        out = self.bn3(self.conv2(out))
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return out + shortcut  # type: ignore[no-any-return]


class IResNet(Backbone):
    """IResNet of a depth in `BLOCKS`."""

    def __init__(self, depth: int, *, embedding_size: int, dropout: float = 0.0) -> None:
        """dropout: share of the 25088 features left out in training, 0 <= dropout < 1. Raises ValueError."""
        super().__init__(embedding_size=embedding_size)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        self.conv1 = nn.Conv2d(3, _STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.prelu = nn.PReLU(_STEM_WIDTH)
        widths_in = (_STEM_WIDTH, *_WIDTHS[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                _Block(width_in, width, stride=2), *(_Block(width, width, stride=1) for _ in range(blocks - 1))
            )
            for width_in, width, blocks in zip(widths_in, _WIDTHS, BLOCKS[depth], strict=True)
        )
        self.bn2 = nn.BatchNorm2d(_WIDTHS[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(_WIDTHS[-1] * FINAL_SIZE**2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # As in the peers' training: a gain for each component would only bend the angles that the loss is about.
        self.features.weight.requires_grad_(False)
        _init(self.conv1, self.bn1)

    def body(self, images_B3HW: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self._stem(images_B3HW)))))
        return self.bn2(x)  # type: ignore[no-any-return]

    def _stem(self, images_B3HW: Tensor) -> Tensor:
        return self.prelu(self.bn1(self.conv1(images_B3HW)))  # type: ignore[no-any-return]

    def parts(self) -> list[Part]:
        blocks = (block for layer in (self.layer1, self.layer2, self.layer3, self.layer4) for block in layer)
        return [Part(self, "_stem"), *map(Part, blocks)]

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.features(self.fc(self.dropout(features_BCHW.flatten(1))))  # type: ignore[no-any-return]
