"""Exported files give what the backbone gives, by onnxruntime and by torch, and appear whole or not at all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from backbones import Backbone, build_backbone, normalise_pixels
from data.rec.records import RecordSet
from data.synthetic import SyntheticFaces
from data.verification_bin import write_bin
from evaluation.__main__ import main
from evaluation.export.check import LIMIT, check_images, worst_difference
from evaluation.export.export import export_onnx
from evaluation.export.form import Deployed, ExportError, Form
from evaluation.export.int8 import Drawn, draw_images
from evaluation.export.run import open_onnx
from evaluation.export.write import write_program
from tests.export_cases import left_in, run_onnx, settled, truth_of
from tests.record_files import image_record, write_set

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
D = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a record set of 13 images of which one is damaged, and a verification set."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    (folder / "run").mkdir()
    torch.save(settled(build_backbone("small", embedding_size=D)).state_dict(), folder / "run" / "backbone.pt")
    (folder / "run" / "config.yaml").write_text(f"model: {{backbone: small, embedding_size: {D}}}\n")
    faces = SyntheticFaces(identities=13, seed=5)
    images = [faces.jpeg(identity, 0) for identity in range(13)]
    images[4] = images[4][:200]
    records = [image_record(key, [key], image) for key, image in enumerate(images)]
    write_set(folder / "set", records, classes=13)
    pairs = [faces.jpeg(number // 2, number % 2 if number % 4 < 2 else 2 + number % 2) for number in range(24)]
    write_bin(folder / "toy.bin", pairs, [number % 2 == 0 for number in range(12)])
    return folder


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    backbone = build_backbone("small", embedding_size=D)
    backbone.load_state_dict(torch.load(place / "run" / "backbone.pt", weights_only=True))
    return backbone.eval()


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """The plainest file."""
    assert _call("--run", place / "run", "--out", place / "face.onnx") == 0
    return place / "face.onnx"


@pytest.fixture
def at_once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's seconds spared: it writes what it wrote before."""

    def copied(network: Deployed, path: Path, about: Mapping[str, str]) -> None:
        shutil.copy(exported, path)

    monkeypatch.setattr("evaluation.export.export.write_onnx", copied)


def _call(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_the_file_is_what_the_backbone_is(exported: Path, backbone: Backbone) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    batch, *image = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert (batch, image) == ("batch", [3, 112, 112])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    about = {entry.key.removeprefix("clusterface."): entry.value for entry in model.metadata_props}
    assert about["backbone"] == "small"
    assert about["embedding_size"] == str(D)
    assert about["precision"] == "float32"
    assert "(pixel - 127.5) / 127.5" in about["input"]
    assert re.fullmatch(r"\d+\.\d+.*", about["version"])
    pixels = check_images()
    for count in (1, 2, 3, 20):
        x = (pixels[:count].astype(np.float32) - 127.5) / 127.5
        truth = truth_of(backbone, pixels[:count])
        np.testing.assert_allclose(run_onnx(exported, x.transpose(0, 3, 1, 2)), truth, atol=1e-4 * np.abs(truth).max())


def test_no_path_of_this_machine_is_in_it(exported: Path, place: Path, backbone: Backbone, tmp_path: Path) -> None:
    write_program(Deployed(backbone, Form()), tmp_path / "model.pt2", {})
    for path in (exported, tmp_path / "model.pt2"):
        content = path.read_bytes()
        for part in (str(ROOT), sys.prefix, str(place), str(tmp_path), "site-packages"):
            assert part.encode() not in content


def test_an_exported_program_of_pixels_and_unit_length(
    place: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "[bold]new" / "face.pt2"
    assert _call("--run", place / "run", "--out", out, "--format", "exported", "--pixels", "--unit") == 0
    assert re.search(r"unit embeddings differ by \d\.\de-\d+ at most, 0.0001 is let pass", capsys.readouterr().out)
    assert left_in(out.parent) == ["face.pt2"]
    extra = {"clusterface.backbone": ""}  # of an empty one torch makes another
    network = torch.export.load(out, extra_files=extra).module()
    assert extra["clusterface.backbone"] == "small"
    assert extra["clusterface.output"] == f"float32 (B, {D}), of length 1"
    for count in (1, 5):
        pixels = check_images()[5 : 5 + count]
        truth = truth_of(backbone, pixels)
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        np.testing.assert_allclose(network(torch.from_numpy(pixels)).numpy(), truth, atol=1e-5)


def test_int8_from_a_set_to_figures(
    place: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "face.onnx"
    command = ["--run", place / "run", "--out", out, "--pixels", "--unit", "--sets", place / "toy.bin"]
    assert _call(*command, "--int8", "--calibrate", place / "set", "--images", 6) == 0
    said = capsys.readouterr().out
    found = re.search(r"on 6 images that .*: cosine (\S+) in the mean, (\S+) at least", said)
    assert found is not None
    assert 0.98 < float(found[1]) < 1
    assert float(found[2]) <= float(found[1])
    assert f"1 images of {place / 'set'} do not decode" in said
    assert len(re.findall(r"toy +accuracy +\d+\.\d\d +\d+\.\d\d", said)) == 1
    model = onnx.load(out)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") > 20
    int8 = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    scales = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if "scale" in tensor.name]
    assert any(scale.shape == (96,) for scale in scales), "a scale for each channel"
    assert len(int8) >= 7
    assert "int8" in {entry.value for entry in model.metadata_props}
    pixels = SyntheticFaces(identities=5, seed=77).pixels
    images = np.stack([pixels(identity, 0) for identity in range(5)])
    embedded, truth = run_onnx(out, images), truth_of(backbone, images)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    cosine = (embedded * truth).sum(1) / np.linalg.norm(truth, axis=1)
    assert 0.9 < cosine.min() < 0.99999
    one_by_one = np.concatenate([run_onnx(out, image[None]) for image in images])
    np.testing.assert_allclose(one_by_one, embedded, atol=1e-6)


def test_images_to_calibrate_by_are_drawn_once(place: Path) -> None:
    records = RecordSet.open(place / "set")
    first, second, bad = draw_images(records, 6)
    again = draw_images(records, 6)
    np.testing.assert_array_equal(again.first_NHW3, first)
    assert bad == again.bad == 1
    both = np.concatenate([first, second]).reshape(12, -1)
    assert len(np.unique(both, axis=0)) == 12, "no image twice"


def test_a_file_that_differs_is_refused_with_the_number(
    exported: Path, at_once: None, backbone: Backbone, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state["linear.weight"][0, 0] += 0.05
    other = build_backbone("small", embedding_size=D)
    other.load_state_dict(state)
    with pytest.raises(ExportError, match=r"to 0.0001 in unit embeddings; the file differs by \d\.\de-0[1-4]:"):
        export_onnx(other.eval(), tmp_path / "face.onnx", name="small", form=Form())
    with pytest.raises(ExportError, match=r"expected embeddings \(1, 7\), the file gives \(1, 16\)"):
        export_onnx(build_backbone("small", embedding_size=7).eval(), tmp_path / "f.onnx", name="small", form=Form())
    state["linear.weight"][0, 0] = torch.nan
    other.load_state_dict(state)
    with pytest.raises(ExportError, match="the backbone's embeddings are not finite"):
        export_onnx(other, tmp_path / "face.onnx", name="small", form=Form())
    assert left_in(tmp_path) == []


class _Shifted(nn.Module):
    def __init__(self, backbone: Backbone, shift: float) -> None:
        super().__init__()
        self.backbone, self.shift = backbone, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BD = self.backbone(x).double()
        x_BD[:, 0] += self.shift * x_BD.norm(dim=1)
        return x_BD


@pytest.mark.parametrize(("share", "passes"), [(0.5, True), (1.5, False)])
def test_the_limit_is_where_it_is_stated(exported: Path, backbone: Backbone, share: float, passes: bool) -> None:
    found = open_onnx(exported)
    network = _Shifted(backbone, share * LIMIT)
    if passes:
        assert worst_difference(network, found, unit=False) == pytest.approx(share * LIMIT, rel=0.1)
    else:
        with pytest.raises(ExportError, match=r"differs by 1.[345]e-04"):
            worst_difference(network, found, unit=False)


def test_a_file_of_another_length_is_refused(exported: Path, backbone: Backbone) -> None:
    with pytest.raises(ExportError, match="the file differs by"):
        worst_difference(lambda x_B3HW: 1.001 * backbone(x_B3HW), open_onnx(exported), unit=False)
    with pytest.raises(ExportError, match="the file differs by"):
        worst_difference(backbone, open_onnx(exported), unit=True)


def test_int8_that_is_far_off_is_refused_but_for_force(
    place: Path, exported: Path, at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("evaluation.export.export.LEAST", 1.1)
    command = ["--run", place / "run", "--out", tmp_path / "face.onnx", "--int8", "--calibrate", place / "set"]
    assert _call(*command, "--images", 2) == 2
    assert re.search(
        r"cosine to the float .* and 1.1 for each image, got 0.9\d+ and 0.9\d+: nothing was written",
        capsys.readouterr().err,
    )
    assert left_in(tmp_path) == []
    assert _call(*command, "--images", 2, "--force") == 0
    assert left_in(tmp_path) == ["face.onnx"]


def test_weights_of_more_than_a_file_holds_lie_beside_it(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.export.write._LARGE", 100_000)
    out = tmp_path / "face.onnx"
    looked = []
    done = export_onnx(backbone, out, name="small", form=Form(), look=looked.append)
    assert done.files == [tmp_path / "face.onnx.data", out]
    assert left_in(tmp_path) == ["face.onnx", "face.onnx.data"]
    assert looked[0].embedding_size == D
    assert out.stat().st_size < 100_000 < done.files[0].stat().st_size
    pixels = check_images()[10:12]
    truth, x = truth_of(backbone, pixels), normalise_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    np.testing.assert_allclose(run_onnx(out, x.numpy()), truth, atol=1e-4 * np.abs(truth).max())
    nothing = np.zeros((0, 112, 112, 3), np.uint8)
    with pytest.raises(ExportError, match=r"--int8: expected weights of less than 1\.5 GiB"):
        export_onnx(backbone, out, name="small", form=Form(), int8=Drawn(nothing, nothing, 0))


def test_weights_that_are_there_are_not_replaced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("evaluation.export.write._LARGE", 100_000)
    (tmp_path / "face.onnx.data").write_bytes(b"of another export")
    assert _call("--run", place / "run", "--out", tmp_path / "face.onnx") == 2
    assert "face.onnx.data: expected no file there" in capsys.readouterr().err
    assert (tmp_path / "face.onnx.data").read_bytes() == b"of another export"
    assert left_in(tmp_path) == ["face.onnx.data"]


def test_verify_takes_an_onnx_file(place: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for model in (["--onnx", exported], ["--run", place / "run"]):
        command = ["verify", *map(str, model), str(place / "toy.bin"), "--resamples", "0", "--device", "cpu"]
        try:
            assert main(command) == 0
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        tables.append(re.findall(r"toy +(\S+) +(\d+\.\d\d)", capsys.readouterr().out))
    assert dict(tables[0]).keys() >= {"accuracy", "auc", "eer"}
    assert tables[0] == tables[1]


def test_the_example_of_the_documentation_runs(exported: Path, backbone: Backbone, tmp_path: Path) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL
    )
    shutil.copy(exported, tmp_path / "face.onnx")
    faces = SyntheticFaces(identities=2, seed=9)
    pixels = np.stack([faces.pixels(identity, 0) for identity in range(2)])
    for name, image in zip("ab", pixels, strict=True):
        cv2.imwrite(str(tmp_path / f"{name}.png"), image[..., ::-1])
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    a, b = truth_of(backbone, pixels)
    assert float(ran.stdout) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)


BAD = [
    (["--weights", "{place}/none.pt", "--backbone", "small"], "none.pt: cannot read it"),
    (["--backbone", "small"], "expected --run FOLDER, or --weights and --backbone"),
    (["--weights", "{place}/toy.bin", "--backbone", "small"], "toy.bin: damaged, or not a file of weights"),
    (["--weights", "{place}/run/backbone.pt", "--backbone", "mobilefacenet"], "the weights of mobilefacenet with 512"),
    (["--run", "{place}/run", "--int8"], "expected both of --int8 and --calibrate"),
    (["--run", "{place}/run", "--calibrate", "{place}/set"], "expected both of --int8 and --calibrate"),
    (
        ["--run", "{place}/run", "--int8", "--calibrate", "{place}/set", "--format", "exported"],
        "--int8: expected --format onnx",
    ),
    (["--run", "{place}/run", "--int8", "--calibrate", "{place}/run"], "run/train.rec: missing"),
    (
        ["--run", "{place}/run", "--int8", "--calibrate", "{place}/set", "--images", "7"],
        r"expected 14 images that decode, .* found 12 \(1 do not decode\): lower --images",
    ),
    (["--run", "{place}/run", "--device", "cuda"], "--device: expected cpu or auto"),
    (["--run", "{place}/run", "--sets", "{place}/face.txt"], "face.txt: cannot read it"),
    (["--run", "{place}/run", "--sets", "{place}/toy.bin", "{place}/x/toy.bin"], "expected sets of different names"),
    (["--run", "{place}/run", "--out", "{place}"], "expected the name of a file, found a folder"),
    (["--run", "{place}/run", "--out", "{place}/toy.bin"], "expected no file there: name another, or replace it"),
    (["--run", "{place}/run", "--out", "{place}/toy.bin/face.onnx"], r"toy.bin.*: cannot write it"),
    (["--run", "{place}/run", "--out", "/proc/face.onnx"], r"/proc.*: cannot write it"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "face.onnx"]
    assert _call(*(text.format(place=place) for text in arguments), *out) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert left_in(tmp_path) == []


def test_ranks_other_sizes_and_missing_packages_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "set", tmp_path / "set")
    (tmp_path / "set" / "property").write_text("13,96,96\n")
    command = ["--run", place / "run", "--out", tmp_path / "face.onnx"]
    assert _call(*command, "--int8", "--calibrate", tmp_path / "set") == 2
    assert "expected images of 112 x 112 pixels, property states 96 x 96" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert _call(*command) == 2
    assert "expected one process, without torchrun" in capsys.readouterr().err
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert _call(*command) == 2
        assert re.search(
            rf"expected the package {package}: .*pip install .* -e '\.\[export\]'", capsys.readouterr().err
        )
    assert left_in(tmp_path) == ["set"]
