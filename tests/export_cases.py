"""Backbones to export, and what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from backbones import Backbone, normalise_pixels
from data.synthetic import SyntheticFaces


def settled(backbone: Backbone) -> Backbone:
    """With statistics of faces in its BatchNorms, as after a training."""
    faces = SyntheticFaces(identities=8, seed=3)
    pixels_BHW3 = np.stack([faces.pixels(identity, 1) for identity in range(8)])
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        backbone.train()(normalise_pixels(torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2)))
    return backbone.eval()


def truth_of(backbone: Backbone, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """In float64, pixels scaled by numpy."""
    x_B3HW = torch.from_numpy((pixels_BHW3.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2).copy())
    state = {name: tensor.double() for name, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        return torch.func.functional_call(backbone, state, (x_B3HW,)).numpy()


def run_onnx(path: Path, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["embeddings"], {"images": images})
    return np.asarray(found)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
