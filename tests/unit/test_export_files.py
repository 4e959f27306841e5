"""ONNX files of every family of backbones, and of others, run in a backbone's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from backbones import Backbone, normalise_pixels
from backbones.iresnet import IResNet
from backbones.mobilefacenet import MobileFaceNet
from backbones.vit import VisionTransformer
from evaluation.export.check import check_images
from evaluation.export.form import Deployed, ExportError, Form
from evaluation.export.run import FileBackbone, open_onnx
from evaluation.export.write import write_onnx
from tests.export_cases import settled, truth_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FAMILIES: dict[str, Callable[[], Backbone]] = {
    "iresnet18": lambda: IResNet(18, embedding_size=8),
    "mobilefacenet": lambda: MobileFaceNet(embedding_size=5),
    "vit": lambda: VisionTransformer(64, 2, embedding_size=8, drop_path=0.1, mask_ratio=0.1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    backbone = settled(FAMILIES[family]())
    write_onnx(Deployed(backbone, Form()), tmp_path / "face.onnx", {})
    found = open_onnx(tmp_path / "face.onnx")
    assert found.embedding_size == backbone.embedding_size
    pixels = check_images()[8:11]  # noise and a face
    truth, x_B3HW = truth_of(backbone, pixels), normalise_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    for start in (0, 2):
        np.testing.assert_allclose(found(x_B3HW[start:]), truth[start:], atol=1e-4 * np.abs(truth).max())


def _odd(path: Path, **changes: Any) -> Path:
    """A file with one Identity, or other inputs and outputs."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    taken = [helper.make_tensor_value_info(f"i{n}", floats, shape) for n, shape in enumerate(changes["inputs"])]
    given = [helper.make_tensor_value_info("o", floats, changes["output"])]
    graph = helper.make_graph([helper.make_node("Identity", ["i0"], ["o"])], "odd", taken, given)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_other_onnx_files_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "empty": b"",
        "text": b"no ONNX at all\n",
        "random": np.random.default_rng(0).bytes(5000),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match=f"{name}: expected an ONNX file that onnxruntime reads: ") as caught:
            open_onnx(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match=r"none\.onnx: expected an ONNX file"):
        open_onnx(tmp_path / "none.onnx")
    two = _odd(tmp_path / "two.onnx", inputs=[["b", 3, 112, 112], ["b", 3, 112, 112]], output=["b", 3, 112, 112])
    with pytest.raises(ExportError, match="expected one input and one output, found 2 and 1"):
        open_onnx(two)
    for shape in (["b", 3, 112, 112], ["b", 3, 224, 224], ["b", 512]):
        with pytest.raises(ExportError, match=r"expected images float \(B, 3, 112, 112\) or uint8"):
            open_onnx(_odd(tmp_path / "odd.onnx", inputs=[shape], output=shape))


def test_pixels_reach_the_file_as_they_were(tmp_path: Path) -> None:
    """Evaluation hands over -1 … 1; all 256 grey levels come back exactly."""
    seen: list[npt.NDArray[np.uint8]] = []

    def run(images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        seen.append(images)
        return np.zeros((len(images), 4), np.float32)

    pixels = np.arange(112 * 112 * 3, dtype=np.int64).reshape(1, 112, 112, 3).astype(np.uint8)
    FileBackbone(run, embedding_size=4, form=Form(pixels=True))(
        normalise_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    )
    np.testing.assert_array_equal(seen[0], pixels)
    assert seen[0].dtype == np.uint8
