"""Vision transformers T, S, B, L and H for faces, with the peers' widths, depths and state dict keys.

Architecture: ViT (arXiv 2010.11929) on 12 x 12 patches of 9 x 9 pixels (the last 4 rows and columns are left out),
without a class token: all patches, not their mean, go through a linear layer, BN, a second one and BN. In training,
stochastic depth (arXiv 1603.09382) and patch dropout: a share of the patches skips the blocks, as in masked
autoencoders (arXiv 2111.06377), and one learned token stands in their places before the linear layer.

Weights of insightface's `vit_*` load unchanged. Where the facts are from: keys, shapes and outputs recorded from their
`vit_t` and `vit_s` (tests/fixtures/vectors), which also settle 8 heads, queries, keys and values in one layer without a
bias, and the epsilons of both normalisations by which the outputs agree; width, depth, stochastic depth and share of
masked patches by the table of names in arcface_torch's backbones/__init__.py; ReLU6 by its vit.py (no recorded
activation reaches 6). B, L and H share S's layers; their outputs were not recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.base import IMAGE_SIZE, Backbone
from backbones.recompute import Part

_PATCH = 9
_PATCHES = (IMAGE_SIZE[0] // _PATCH) * (IMAGE_SIZE[1] // _PATCH)
_HEADS = 8
_HIDDEN = 4
"""Width of a block's two-layer network, in widths of a token."""
_BN_EPS = 2e-5
_STD = 0.02
"""Of first weights, as ViT's authors have it."""


class Variant(NamedTuple):
    width: int
    depth: int
    drop_path: float
    mask_ratio: float


VARIANTS = {
    "vit_t": Variant(256, 12, 0.1, 0.1),
    "vit_t_dp005_mask0": Variant(256, 12, 0.05, 0.0),
    "vit_s": Variant(512, 12, 0.1, 0.1),
    "vit_s_dp005_mask_0": Variant(512, 12, 0.05, 0.0),
    "vit_b": Variant(512, 24, 0.1, 0.1),
    "vit_b_dp005_mask_005": Variant(512, 24, 0.05, 0.05),
    "vit_l": Variant(768, 24, 0.1, 0.1),
    "vit_l_dp005_mask_005": Variant(768, 24, 0.05, 0.05),
    "vit_h": Variant(1024, 48, 0.1, 0.0),
}
"""By the peers' names, but for `vit_l`: they have only the one with a suffix, and this is it with vit_b's settings."""


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        B, L, C = x_BLC.shape
        q, k, v = self.qkv(x_BLC).view(B, L, 3, _HEADS, C // _HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # on GPUs no (L, L) matrix is kept
        return self.proj(out.transpose(1, 2).reshape(B, L, C))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _HIDDEN * width)
        self.fc2 = nn.Linear(_HIDDEN * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x_BLC), inplace=True))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Attention and a two-layer network, each on normalised tokens and added to what it was given."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)  # here, for the peers' order of keys
        self.attn = _Attention(width)
        self.mlp = _MLP(width)
        self.drop_path = drop_path

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self._dropped(self.attn(self.norm1(x_BLC)))
        return x_BLC + self._dropped(self.mlp(self.norm2(x_BLC)))

    def _dropped(self, branch_BLC: Tensor) -> Tensor:
        """Without a share of the images, and larger for the others by as much."""
        if not (self.training and self.drop_path):
            return branch_BLC
        keep = 1 - self.drop_path
        kept_B11 = torch.empty(len(branch_BLC), 1, 1, dtype=branch_BLC.dtype, device=branch_BLC.device)
        return branch_BLC * kept_B11.bernoulli_(keep).div_(keep)


class _PatchEmbed(nn.Module):
    """The module's name is part of the peers' keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, _PATCH, stride=_PATCH)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.proj(images_B3HW).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(Backbone):
    """Legend besides `Backbone`'s: L patches, here 144; K patches that are not masked; C width of a token."""

    def __init__(self, width: int, depth: int, *, embedding_size: int, drop_path: float, mask_ratio: float) -> None:
        """drop_path: share of the images that the last block leaves as they are in training; of the others it grows
        from 0 with their number. mask_ratio: share of the patches masked in training, drawn for each image. Both from 0
        to below 1, and drawn by torch's global generator. Raises ValueError.
        """
        super().__init__(embedding_size=embedding_size)
        for name, value in (("drop_path", drop_path), ("mask_ratio", mask_ratio)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
        self.kept = int(_PATCHES * (1 - mask_ratio))
        """Patches that go through the blocks in training."""
        if self.kept < 1:
            raise ValueError(f"mask_ratio: expected to leave one of {_PATCHES} patches, got {mask_ratio}")
        self.pos_embed = nn.Parameter(torch.zeros(1, _PATCHES, width))
        # Where nothing is masked it has no gradient, which DistributedDataParallel would wait for.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=self.kept < _PATCHES)
        self.patch_embed = _PatchEmbed(width)
        self.blocks = nn.ModuleList(_Block(width, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * _PATCHES, width, bias=False),
            nn.BatchNorm1d(width, eps=_BN_EPS),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=_BN_EPS),
        )
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.pos_embed, std=_STD)
        nn.init.normal_(self.mask_token, std=_STD)

    def body(self, images_B3HW: Tensor) -> Tensor:
        """Tokens (B, L, C) in float32, the mask token among them where a patch was masked."""
        x = self.patch_embed(images_B3HW) + self.pos_embed
        if not self.training or self.kept == _PATCHES:
            return self._encoded(x)
        order_BL = torch.rand(x.shape[:2], device=x.device).argsort(1)
        kept_BKC = order_BL[:, : self.kept, None].expand(-1, -1, x.shape[2])
        encoded_BKC = self._encoded(x.gather(1, kept_BKC))
        return self.mask_token.to(encoded_BKC.dtype).expand_as(x).scatter(1, kept_BKC, encoded_BKC)

    def _encoded(self, x_BKC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BKC = block(x_BKC)
        return self.norm(x_BKC)  # type: ignore[no-any-return]

    def parts(self) -> list[Part]:
        return [Part(block) for block in self.blocks]

    def head(self, features_BLC: Tensor) -> Tensor:
        return self.feature(features_BLC.flatten(1))  # type: ignore[no-any-return]
