"""Whole numbers of 8 bits in place of float32 in an ONNX file, by onnxruntime, and what that does to embeddings.

Static: ranges are found once, from images. Where onnxruntime finds them as it runs (its dynamic quantisation), an
image's embedding depends on the other images of its batch.

Legend: N images, H, W pixels, D components of an embedding.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from backbones import IMAGE_SIZE, normalise_pixels
from data.errors import DataError, said
from data.loading.decode import DecodeError
from data.rec.recordio import RecordError
from data.rec.records import RecordSet
from evaluation.embed.sources import RecordImages
from evaluation.export.form import INPUT, ExportError, Form, needed
from evaluation.export.run import FileBackbone
from evaluation.export.write import check_onnx, quiet

Pixels = npt.NDArray[np.uint8]
LEAST_MEAN, LEAST = 0.98, 0.9
"""Mean and least cosine to the float embeddings that are let pass."""
_PERCENTILE = 99.99
"""Of a layer's values that its 8 bits reach: a few far ones would cost all others their digits."""
_SEED = 0
_BATCH = 8
"""Images at a time; all values of all layers of so many are in memory while ranges are found."""


class Drawn(NamedTuple):
    """first_NHW3, second_NHW3: uint8, N images each, none in both. bad: images that were passed over."""

    first_NHW3: Pixels
    second_NHW3: Pixels
    bad: int


class Cosines(NamedTuple):
    """Between embeddings of the float file and of the int8 file."""

    mean: float
    least: float


def draw_images(records: RecordSet, count: int) -> Drawn:
    """`count` images to calibrate by and `count` others to compare by, the same ones each time.

    Images that do not decode are passed over. Raises DataError when there are too few, or of another size.
    """
    images = RecordImages(records)
    pixels = np.empty((2 * count, *IMAGE_SIZE, 3), np.uint8)
    found = bad = 0
    for sample in np.random.default_rng(_SEED).permutation(records.num_samples).tolist():
        if found == len(pixels):
            break
        try:
            images.decode(sample, pixels[found])
            found += 1
        except (DecodeError, RecordError):
            bad += 1
    if found < len(pixels):
        raise DataError(
            f"{records.address}: expected {len(pixels)} images that decode, half to calibrate by and half to compare "
            f"by, found {found} ({bad} do not decode): lower --images, or name a larger set"
        )
    return Drawn(pixels[:count], pixels[count:], bad)


def quantise(source: Path, target: Path, images_NHW3: Pixels, form: Form) -> None:
    """Write an ONNX file with int8 weights (one scale a channel) and uint8 values (one scale a tensor), as QDQ.

    source: a float file of `export_write`, of less than 2 GiB. images_NHW3: to find the ranges by. The first
    convolution stays float: it is little work. Weights have 7 of the 8 bits, as sums of products overflow on processors
    without VNNI (onnxruntime's `quantize_static`). What either gives: docs/export.md. Raises OSError, and ExportError
    when a package is missing or onnxruntime cannot quantise the backbone.
    """
    onnx, tools = needed("onnx"), needed("onnxruntime.quantization")
    model = onnx.load(str(source))
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    settings = {
        "quant_format": tools.QuantFormat.QDQ,
        "per_channel": True,
        "reduce_range": True,
        "activation_type": tools.QuantType.QUInt8,
        "weight_type": tools.QuantType.QInt8,
        "nodes_to_exclude": convolutions[:1],
        "calibrate_method": tools.CalibrationMethod.Percentile,
        "extra_options": {"CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},
    }
    # It prints what it does, and warns that its own preparation was left out, which changes nothing here.
    with quiet(""), contextlib.redirect_stdout(io.StringIO()):
        try:
            tools.quantize_static(model, str(target), _Reader(images_NHW3, form), **settings)
        except Exception as error:  # of no common class
            raise ExportError(f"onnxruntime cannot quantise this backbone: {said(error):.200}") from None
    check_onnx(target)


@torch.no_grad()
def cosines(expected: FileBackbone, found: FileBackbone, images_NHW3: Pixels) -> Cosines:
    """Between the embeddings of two files, image by image."""
    each = []
    for start in range(0, len(images_NHW3), _BATCH):
        x_B3HW = normalise_pixels(torch.from_numpy(images_NHW3[start : start + _BATCH]).permute(0, 3, 1, 2))
        each.append(torch.cosine_similarity(expected(x_B3HW).double(), found(x_B3HW).double()))
    cosine_N = torch.cat(each)
    return Cosines(float(cosine_N.mean()), float(cosine_N.min()))


class _Reader:
    """Batches of images, as onnxruntime's calibration asks for them: a batch a step, not all in memory at once."""

    def __init__(self, images_NHW3: Pixels, form: Form) -> None:
        self._batches = [images_NHW3[start : start + _BATCH] for start in range(0, len(images_NHW3), _BATCH)]
        self._form = form
        self._left: Iterator[Pixels] = iter(())

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        images_BHW3 = next(self._left, None)
        return None if images_BHW3 is None else {INPUT: self._form.input_of(torch.from_numpy(images_BHW3)).numpy()}
