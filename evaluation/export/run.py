"""Exported files run in a backbone's place, so that all of evaluation takes them. On the CPU.

Legend: B images, 3 colours (RGB), H, W pixels, D components of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from backbones import IMAGE_SIZE, Backbone
from data.errors import said
from evaluation.export.form import ExportError, Form, needed

Run = Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
_TAKEN = {
    "tensor(float)": (3, *IMAGE_SIZE),
    "tensor(uint8)": (*IMAGE_SIZE, 3),
}


class FileBackbone(Backbone):
    """What is in a file, as a backbone: images float32 (B, 3, 112, 112), -1 … 1, to embeddings (B, D) float32."""

    def __init__(self, run: Run, *, embedding_size: int, form: Form) -> None:
        """run: from images as `form` has them to embeddings."""
        super().__init__(embedding_size=embedding_size)
        self.form = form
        self._run = run
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        """Without weights: where a caller puts a backbone says where its embeddings are wanted."""

    def body(self, images_B3HW: Tensor) -> Tensor:
        """The images."""
        return images_B3HW

    def head(self, features_BCHW: Tensor) -> Tensor:
        """See `Backbone`; pixels are whole numbers again, exactly, where the file takes them."""
        images = features_BCHW.detach().cpu()
        if self.form.pixels:
            images = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        x_BD = self._run(images.contiguous().numpy())
        return torch.from_numpy(x_BD).to(features_BCHW.device)


def open_onnx(path: Path) -> FileBackbone:
    """An ONNX file as a backbone: `export`'s, or any with one input and one output of their shapes.

    Raises ExportError when onnxruntime is missing, or the file cannot be read, is none, or takes or gives other things.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ExportError(f"{path}: expected an ONNX file that onnxruntime reads: {said(error):.200}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(f"{path}: expected one input and one output, found {len(inputs)} and {len(outputs)}")
    taken, given = inputs[0], outputs[0]
    size = given.shape[-1] if len(given.shape) == 2 else None
    fits = tuple(taken.shape[1:]) == _TAKEN.get(taken.type) and not isinstance(taken.shape[0], int)
    if not fits or given.type != "tensor(float)" or not isinstance(size, int):
        raise ExportError(
            f"{path}: expected images float (B, 3, {IMAGE_SIZE[0]}, {IMAGE_SIZE[1]}) or uint8 (B, {IMAGE_SIZE[0]}, "
            f"{IMAGE_SIZE[1]}, 3), any number B of them, to embeddings float (B, D), found {taken.type} {taken.shape} "
            f"to {given.type} {given.shape}"
        )

    def run(images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        try:
            return np.asarray(session.run(None, {taken.name: images})[0])
        except Exception as error:
            raise ExportError(f"{path}: onnxruntime cannot run it: {said(error):.200}") from None

    return FileBackbone(run, embedding_size=size, form=Form(pixels=taken.type == "tensor(uint8)"))


def open_program(path: Path, *, embedding_size: int, form: Form) -> FileBackbone:
    """An ExportedProgram of `evaluation.export_write` as a backbone. torch unpickles it: only what this process wrote.

    Raises what torch raises.
    """
    network = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return np.asarray(network(torch.from_numpy(images)).numpy())

    return FileBackbone(run, embedding_size=embedding_size, form=form)
