"""The benchmark of the backbones: its counts are those of the layers, its table holds what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backbones import Backbone, build_backbone
from backbones.iresnet import BLOCKS
from benchmarks import backbones
from benchmarks.backbones import ARMS, HEADER, PUBLISHED, main
from benchmarks.planning.activations import bytes_per_image
from training.showing.flops import forward_flops


class _Line(Backbone):
    """One convolution of 16 x 16 pixels to 2 channels, a tanh and a linear layer to 5 components."""

    def __init__(self) -> None:
        super().__init__(embedding_size=5)
        self.convolution = nn.Conv2d(3, 2, 16, stride=16)
        self.linear = nn.Linear(2 * 49, 5)

    def body(self, images_B3HW: Tensor) -> Tensor:
        return torch.tanh(self.convolution(images_B3HW))

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.linear(features_BCHW.flatten(1))


def test_bytes_of_an_image_by_hand() -> None:
    """Kept: what tanh gave, which the linear layer reads as well. Peak: with it the gradient of the embedding and, at
    the highest point, the gradients on both sides of tanh; or in forward what tanh was given and the embedding."""
    counted = bytes_per_image(_Line)
    assert counted.kept == pytest.approx(4 * 98, abs=1)
    assert 4 * (98 + 98 + 98) <= counted.peak <= 4 * (98 + 98 + 98 + 5 + 5) + 1
    half = bytes_per_image(_Line, dtype=torch.bfloat16)
    images_in_half, after_tanh, for_the_head = 2 * 3 * 112**2, 2 * 98, 4 * 98
    assert half.kept == pytest.approx(images_in_half + after_tanh + for_the_head, abs=1)


def _flops(name: str) -> int:
    with torch.device("meta"):
        backbone = build_backbone(name).eval()
    return forward_flops(backbone.to_empty(device="cpu"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_those_published(name: str) -> None:
    """To the last digit that they give, but for two that are 0.1 lower and 3%."""
    tolerance = {"iresnet200": 0.1, "mobilefacenet": 0.0135}.get(name, 0.05)
    assert abs(_flops(name) / 2e9 - PUBLISHED[name]) <= tolerance


def test_flops_of_iresnet_50_layer_by_layer() -> None:
    """Written down from the architecture: two 3x3 convolutions a block, a projection a stage, a linear layer."""
    widths, side, before = (64, 128, 256, 512), 112, 64
    products = 3 * 64 * 9 * side**2
    for width, blocks in zip(widths, BLOCKS[50], strict=True):
        products += (
            before * width * 9 * side**2 + width * width * 9 * (side // 2) ** 2 + before * width * (side // 2) ** 2
        )
        side //= 2
        products += (blocks - 1) * 2 * width * width * 9 * side**2
        before = width
    products += 512 * 49 * 512
    assert _flops("iresnet50") == 2 * products


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "backbones.md"
    arguments = ["--only", "small", "vit_t", "--timed", "small", "--batch", "2", "--dim", "16", "--repeats", "2"]
    assert main([*arguments, "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    assert "small" in capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    timed, counted = list(ARMS[:3]), list(ARMS[1:3])
    assert [(row["backbone"], row["arm"]) for row in rows] == [
        *(("small", arm) for arm in timed),
        *(("vit_t", arm) for arm in counted),
    ]
    assert all(len(row["step seconds"]) == len(row["forward seconds"]) == 2 for row in rows[:3])
    whole, again = rows[3:]
    assert (
        whole["weights"]
        == again["weights"]
        == sum(w.numel() for w in build_backbone("vit_t", embedding_size=16).parameters())
    )
    assert again["fp32"]["kept"] < 0.3 * whole["fp32"]["kept"]
    assert whole["bf16"]["kept"] < whole["fp32"]["kept"]
    table = [
        line.strip("| \n").split(" | ") for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    assert tuple(table[0]) == HEADER
    assert {len(line) for line in table} == {len(HEADER)}
    assert table[2][HEADER.index("step / plain")] == "1.00"
    assert table[6][HEADER.index("published")] == "3"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--batch", "1"], "--batch of at least 2"),
        (["--repeats", "0"], "--repeats"),
        (["--only", "smal"], "did you mean small"),
        (["--only", "small", "--timed", "vit_t"], "vit_t is not among those of --only"),
        (["--dim", "0"], "--dim"),
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*wrong, "--device", "cpu"])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_compiled_arm_is_one_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Backbone, "compile_body", lambda self: None)
    monkeypatch.setattr("training.distributed._try_compiler", lambda device: None)
    monkeypatch.setattr(backbones, "count", lambda name, dim: [])
    out = tmp_path / "backbones.md"
    arguments = ["--only", "small", "--batch", "2", "--dim", "8", "--repeats", "1", "--warmup", "0", "--compile"]
    assert main([*arguments, "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == list(ARMS)
