"""What an exported network takes and gives: the images of training, or plain pixels; embeddings, or those of length 1.

Legend: B images, 3 colours (RGB), H, W pixels, D components of an embedding.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones import IMAGE_SIZE, Backbone, normalise_pixels
from configs.extras import installing
from data.errors import DataError, said

INPUT, OUTPUT = "images", "embeddings"
"""Names in an ONNX file."""


class ExportError(DataError):
    """A package is missing, or what was exported does not do what the backbone does: one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Of the input and the output of an exported network."""

    pixels: bool = False
    """Takes uint8 (B, 112, 112, 3), 0 … 255, as decoders write it; else float32 (B, 3, 112, 112), -1 … 1. Both RGB."""
    unit: bool = False
    """Gives embeddings of length 1; else of any length, as the backbone does."""

    def input_of(self, images_BHW3: Tensor) -> Tensor:
        """uint8 pixels as the network takes them."""
        return images_BHW3 if self.pixels else normalise_pixels(images_BHW3.permute(0, 3, 1, 2)).contiguous()


class Deployed(nn.Module):
    """A backbone in a form, in evaluation mode; what is exported."""

    def __init__(self, backbone: Backbone, form: Form) -> None:
        super().__init__()
        self.backbone, self.form = backbone, form
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, D) of images as `form` has them."""
        x_B3HW = normalise_pixels(images.permute(0, 3, 1, 2)) if self.form.pixels else images
        # Not the backbone's own forward: its checks and autocast are training's, and would be part of the file.
        x_BD = self.backbone.head(self.backbone.body(x_B3HW))
        return nn.functional.normalize(x_BD) if self.form.unit else x_BD


def example(form: Form, images: int = 2) -> Tensor:
    """Images of zeros."""
    return form.input_of(torch.zeros(images, *IMAGE_SIZE, 3, dtype=torch.uint8))


def describe(name: str, embedding_size: int, form: Form) -> dict[str, str]:
    """What is written into the file, by name; all of it text."""
    height, width = IMAGE_SIZE
    pixels = f"RGB faces aligned to {width} x {height} by insightface's five points"
    taken = (
        f"uint8 (B, {height}, {width}, 3), 0 … 255"
        if form.pixels
        else (f"float32 (B, 3, {height}, {width}), (pixel - 127.5) / 127.5")
    )
    return {
        "clusterface.version": _own_version(),
        "clusterface.backbone": name,
        "clusterface.embedding_size": str(embedding_size),
        "clusterface.input": f"{pixels}: {taken}",
        "clusterface.output": f"float32 (B, {embedding_size}), {'of length 1' if form.unit else 'of any length'}",
    }


def needed(module: str) -> Any:
    """A module of the extra `export`. Raises ExportError where it is missing or does not load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"expected the package {module}: {said(error):.200}: {installing('export')}") from None


def _own_version() -> str:
    try:
        return importlib.metadata.version("clusterface")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
