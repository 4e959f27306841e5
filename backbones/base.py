"""What every backbone shares: the images it takes, and an embedding that stays in float32 under autocast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backbones.recompute import Part
from backbones.recorded import Recorded, record

IMAGE_SIZE = (112, 112)
"""(height, width) of an aligned face in this field."""

FINAL_SIZE = 7
"""Height and width after four halvings of 112; the layers that end a backbone have weights for each of these places."""


def normalise_pixels(images_B3HW: Tensor) -> Tensor:
    """uint8 0 … 255 to float32 -1 … 1, the input of every backbone; memory format is kept."""
    return images_B3HW.float().sub_(127.5).div_(127.5)


class Backbone(nn.Module, ABC):
    """Image to embedding.

    Legend: B images, 3 colours (RGB), H, W pixels, C channels, D components of an embedding.
    """

    def __init__(self, *, embedding_size: int) -> None:
        super().__init__()
        if embedding_size < 1:
            raise ValueError(f"embedding_size: expected at least 1, got {embedding_size}")
        self.embedding_size = embedding_size
        self._compiled_body: Callable[[Backbone, Tensor], Tensor] | None = None
        self._recorded: Recorded | None = None

    @abstractmethod
    def body(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, C, 7, 7), or tokens (B, 144, C) of a transformer."""

    @abstractmethod
    def head(self, features_BCHW: Tensor) -> Tensor:
        """Embeddings (B, D) of features in the weights' dtype."""

    def parts(self) -> list[Part]:
        """What `recompute` may compute again, in the order in which an image passes; none unless a backbone says so."""
        return []

    def compile_body(self, *, backend: str = "inductor") -> None:
        """Run `body` through torch.compile in training from now on; evaluation, and weights and their names stay.

        The first step of each batch size compiles, for a minute or so. backend: one of torch.compile's.
        """
        # Of the class, not of this object: a copy of the object then runs its own weights.
        self._compiled_body = torch.compile(type(self).body, dynamic=False, backend=backend)

    def record(self, images_B3HW: Tensor) -> None:
        """Replay training's passes of images like these, there and back, as CUDA graphs from now on.

        images_B3HW: in the memory format of training. Call it in training mode, in the autocast of training but with
        cache_enabled=False. Other images, evaluation and copies of this backbone do without the graphs. An embedding is
        overwritten by the next pass, and so are gradients that were not copied, as DDP copies them. After this, weights
        and buffers may change, but not move. Raises what torch raises for a network that cannot be recorded.
        """
        self._recorded = None
        self._recorded = record(self, images_B3HW)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Embeddings (B, D), not of unit length, in the weights' dtype: float32, also under autocast.

        images_B3HW: RGB, -1 … 1 (`normalise_pixels`), 112 x 112. The head runs outside autocast, because the angles
        that the loss compares are finer than bf16's three digits. Raises ValueError for other images.
        """
        if images_B3HW.shape[1:] != (3, *IMAGE_SIZE) or not images_B3HW.is_floating_point():
            raise ValueError(
                f"expected floating-point images of shape (B, 3, {IMAGE_SIZE[0]}, {IMAGE_SIZE[1]}) scaled to -1 … 1, "
                f"got {images_B3HW.dtype} of shape {tuple(images_B3HW.shape)}: align and normalise_pixels first"
            )
        is_training = self.training and torch.is_grad_enabled()
        if is_training and self._recorded is not None and self._recorded.takes(images_B3HW):
            return self._recorded(images_B3HW)
        compiled = self._compiled_body if is_training else None
        features_BCHW = self.body(images_B3HW) if compiled is None else compiled(self, images_B3HW)
        with torch.autocast(features_BCHW.device.type, enabled=False):
            return self.head(features_BCHW.to(next(self.parameters()).dtype))


def init_he(module: nn.Module) -> None:
    """Kaiming He's normal initialisation (arXiv 1502.01852) of every convolution in `module`, by fan-in."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
