"""Backbones by name: aligned RGB faces of 112 x 112 pixels to embeddings."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from backbones.base import IMAGE_SIZE, Backbone, normalise_pixels
from backbones.iresnet import BLOCKS, IResNet
from backbones.mobilefacenet import MobileFaceNet
from backbones.recompute import recompute as compute_again
from backbones.small import SmallNet
from backbones.timm_models import PREFIX, TimmBackbone
from backbones.vit import VARIANTS, VisionTransformer

__all__ = ["IMAGE_SIZE", "Backbone", "build_backbone", "names", "normalise_pixels"]

_BUILDERS: dict[str, Callable[..., Backbone]] = {
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in BLOCKS},
    "mobilefacenet": MobileFaceNet,
    **{
        name: partial(VisionTransformer, v.width, v.depth, drop_path=v.drop_path, mask_ratio=v.mask_ratio)
        for name, v in VARIANTS.items()
    },
    "small": SmallNet,
}


def names() -> tuple[str, ...]:
    """The names of our own that `build_backbone` takes."""
    return tuple(_BUILDERS)


def build_backbone(name: str, *, embedding_size: int = 512, recompute: float = 0.0, **settings: Any) -> Backbone:
    """A new backbone with random weights, by torch's global generator.

    name: one of `names()`, or `timm/` and a name of timm's. embedding_size: D. recompute: share of its blocks, from the
    first on, that keep only their input in training and are computed again in backward (`backbones.recompute`).
    settings: what the backbone has beside it (`dropout` of the IResNets, `drop_path` and `mask_ratio` of the ViTs).
    Raises ValueError for an unknown name or a value out of range, TypeError for a setting that it does not have.
    """
    if name.startswith(PREFIX):
        backbone: Backbone = TimmBackbone(name.removeprefix(PREFIX), embedding_size=embedding_size, **settings)
    elif name in _BUILDERS:
        backbone = _BUILDERS[name](embedding_size=embedding_size, **settings)
    else:
        nearest = difflib.get_close_matches(name, _BUILDERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"expected one of {', '.join(_BUILDERS)}, got {name!r}: did you mean {nearest}?")
    compute_again(backbone.parts(), recompute)
    return backbone
