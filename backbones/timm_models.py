"""Any model of timm (https://github.com/huggingface/pytorch-image-models) as a backbone; an extra, imported when used.

The model's own features and pooling at 112 x 112 pixels, then BN, a linear layer and BN as at the end of an IResNet.
Weights are random: nothing is downloaded. timm's defaults hold for all else, so that there is no stochastic depth.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import IMAGE_SIZE, Backbone
from backbones.recompute import Part
from configs.extras import installing

PREFIX = "timm/"
_NEAREST = 3
_BLOCK = re.compile("Block|Bottleneck|Residual")
"""In the names of timm's classes for what a model repeats."""


class TimmBackbone(Backbone):
    """A model of timm with an embedding in place of its classifier."""

    def __init__(self, name: str, *, embedding_size: int) -> None:
        """name: of `timm.list_models()`. Runs two black images through the model, there and back.

        Raises ValueError, one line, when timm is missing, does not know the name, or its model does not take images of
        112 x 112 pixels.
        """
        super().__init__(embedding_size=embedding_size)
        timm = _timm(name)
        known = timm.list_models()
        if name not in known:  # timm itself would also take addresses, and download
            nearest = [PREFIX + found for found in difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0.0)]
            raise ValueError(
                f"expected {PREFIX} and one of the {len(known)} names of timm.list_models(), got {PREFIX + name!r}: "
                f"did you mean {' or '.join(nearest)}?"
            )
        try:
            self.model = _create(timm, name)
            width = self._try_out()
        except Exception as error:  # timm's models raise nearly anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{PREFIX}{name}: expected a model for images of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels, but: "
                f"{said:.200}: choose another"
            ) from None
        self.bn = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, embedding_size, bias=False)  # the BN has a bias
        self.features = nn.BatchNorm1d(embedding_size)

    def _try_out(self) -> int:
        """Width of the pooled features. Weights that they do not depend on are no longer trained."""
        mode = self.model.training
        self.model.eval()
        pooled_BC = self._pooled(self.body(torch.zeros(2, 3, *IMAGE_SIZE, device=next(self.parameters()).device)))
        self.model.train(mode)
        if pooled_BC.dim() != 2:
            raise ValueError(f"its features have the shape {tuple(pooled_BC.shape[1:])}")
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(pooled_BC.sum(), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            # DistributedDataParallel would wait for the gradient of one without.
            weight.requires_grad_(gradient is not None)
        return pooled_BC.shape[1]

    def body(self, images_B3HW: Tensor) -> Tensor:
        """Features as the model has them: (B, C, H, W), (B, H, W, C) or tokens (B, L, C)."""
        return self.model.forward_features(images_B3HW)  # type: ignore[no-any-return, operator]

    def _pooled(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features, pre_logits=True)  # type: ignore[no-any-return, operator]

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.features(self.fc(self.bn(self._pooled(features_BCHW))))  # type: ignore[no-any-return]

    def parts(self) -> list[Part]:
        """The outermost modules that timm calls blocks, bottlenecks or residuals."""
        found: list[Part] = []
        inside = ""
        for name, module in self.model.named_modules():
            if inside and name.startswith(inside):
                continue
            if _BLOCK.search(type(module).__name__):
                found.append(Part(module))
                inside = name + "."
        return found


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        missing = error.name or "timm"
        raise ValueError(f"{PREFIX}{name} needs {missing}, which is not installed: {installing('timm')}") from None
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
        said = " ".join(str(error).split())
        raise ValueError(
            f"{PREFIX}{name}: timm cannot be imported ({said:.200}): install the torchvision that was built for torch "
            f"{torch.__version__}"
        ) from None


def _create(timm: Any, name: str) -> nn.Module:
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    found = timm.get_pretrained_cfg(name)
    if found is not None and found.fixed_input_size:
        settings["img_size"] = IMAGE_SIZE
    model: nn.Module = timm.create_model(name, **settings)
    return model
