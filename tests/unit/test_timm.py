"""Models of timm as backbones: what the wrapper asks of them, on stand-ins; the genuine ones where timm is there."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import build_backbone, names
from configs.schema import ModelConfig

GENUINE = ("convnext_atto", "resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050")


def _has_timm() -> bool:
    """With a torchvision that was built for this torch."""
    try:
        importlib.import_module("timm")
    except Exception:
        return False
    return True


HAS_TIMM = _has_timm()


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + torch.relu(self.norm(self.conv(x_BCHW)))


class _ConvNet(nn.Module):
    """As timm's: features apart from pooling, which ends before the classifier; one weight that neither reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.blocks = nn.Sequential(_ResidualBlock(8), _ResidualBlock(8))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward_head(self, x: Tensor, *, pre_logits: bool) -> Tensor:
        assert pre_logits
        return x.mean((2, 3))


class _Tokens(nn.Module):
    """Made for one size of images."""

    def __init__(self, img_size: tuple[int, int]) -> None:
        super().__init__()
        side = img_size[0] // 16
        self.patches = nn.Conv2d(3, 6, 16, stride=16)
        self.places = nn.Parameter(torch.randn(1, side * side, 6))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.places

    def forward_head(self, x: Tensor, *, pre_logits: bool) -> Tensor:
        return x[:, 0]


class _NotPooled(_ConvNet):
    def forward_head(self, x: Tensor, *, pre_logits: bool) -> Tensor:
        return x


class _Assertive(_ConvNet):
    def forward_features(self, x: Tensor) -> Tensor:
        raise AssertionError(f"Input size ({x.shape[2]})\n doesn't match model (224)")


@dataclasses.dataclass
class _Settings:
    fixed_input_size: bool


MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet_tiny": _ConvNet,
    "tokens_base": _Tokens,
    "not_pooled": _NotPooled,
    "assertive": _Assertive,
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module `timm`, and the calls of its create_model."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, **settings: Any) -> nn.Module:
        calls.append({"name": name, **settings})
        wanted = {key: value for key, value in settings.items() if key not in ("pretrained", "num_classes")}
        return MODELS[name](**wanted)

    timm = types.ModuleType("timm")
    vars(timm).update(
        list_models=lambda: list(MODELS),
        create_model=create_model,
        get_pretrained_cfg=lambda name: _Settings(name == "tokens_base") if name != "convnet_tiny" else None,
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112) * 2 - 1


def test_nothing_is_downloaded_and_fixed_sizes_are_ours(stand_in: list[dict[str, Any]]) -> None:
    for name in ("timm/convnet_tiny", "timm/tokens_base"):
        assert build_backbone(name, embedding_size=5)(_images(3)).shape == (3, 5)
    assert stand_in == [
        {"name": "convnet_tiny", "pretrained": False, "num_classes": 0},
        {"name": "tokens_base", "pretrained": False, "num_classes": 0, "img_size": (112, 112)},
    ]


def test_features_and_head_are_the_models(stand_in: list[dict[str, Any]]) -> None:
    backbone = build_backbone("timm/convnet_tiny", embedding_size=5)
    images = _images(4)
    pooled_BC = backbone.model.forward_features(images).mean((2, 3))
    by_hand = nn.functional.batch_norm(pooled_BC, None, None, training=True) @ backbone.fc.weight.T
    expected = nn.functional.batch_norm(by_hand, None, None, training=True)
    torch.testing.assert_close(backbone(images), expected, atol=1e-4, rtol=1e-4)


def test_the_trial_leaves_no_trace(stand_in: list[dict[str, Any]]) -> None:
    torch.manual_seed(7)
    backbone = build_backbone("timm/convnet_tiny", embedding_size=5)
    torch.manual_seed(7)
    alone = _ConvNet().state_dict()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, alone[name]), name
    assert all(part.training for part in backbone.modules())
    assert all(weight.grad is None for weight in backbone.parameters())


def test_weights_that_nothing_reads_are_not_trained(stand_in: list[dict[str, Any]]) -> None:
    """DistributedDataParallel would wait for their gradient."""
    backbone = build_backbone("timm/convnet_tiny", embedding_size=5)
    frozen = [name for name, weight in backbone.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.unused"]
    backbone(_images(3)).square().sum().backward()
    assert all(weight.grad is not None for weight in backbone.parameters() if weight.requires_grad)


def test_embeddings_are_float32_under_autocast(stand_in: list[dict[str, Any]]) -> None:
    backbone = build_backbone("timm/convnet_tiny", embedding_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone.body(_images(2)).dtype == torch.bfloat16
        assert backbone(_images(2)).dtype == torch.float32


def test_blocks_are_found_by_their_class_and_computed_again(stand_in: list[dict[str, Any]]) -> None:
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(7)
        backbone = build_backbone("timm/convnet_tiny", embedding_size=5, recompute=share)
        backbone(torch.ones(2, 3, 112, 112) * torch.tensor([0.3, -0.2]).view(2, 1, 1, 1)).square().sum().backward()
        gradients = [weight.grad for weight in backbone.parameters() if weight.grad is not None]
        found.append([*gradients, *(buffer.clone() for buffer in backbone.buffers())])
    assert [part.module for part in backbone.parts()] == list(backbone.model.blocks)
    assert len(found[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(ValueError, match="no blocks to compute again"):
        build_backbone("timm/tokens_base", recompute=0.5)


def test_shapes_alone(stand_in: list[dict[str, Any]]) -> None:
    """As the doctor counts weights."""
    with torch.device("meta"):
        backbone = build_backbone("timm/convnet_tiny", embedding_size=5)
    assert backbone.fc.weight.shape == (5, 8)
    assert all(weight.is_meta for weight in backbone.parameters())


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("convnet_tini", "timm/convnet_tiny"),
        ("", "timm/"),
        ("convnet_tiny.in1k", "timm/convnet_tiny"),
        ("hf-hub:someone/convnet_tiny", "timm/convnet_tiny"),
        ("../convnet_tiny", "timm/convnet_tiny"),
        ("[red]convnet_tiny[/red]", "timm/convnet_tiny"),
    ],
)
def test_an_unknown_name_is_refused_before_timm_sees_it(
    stand_in: list[dict[str, Any]], wrong: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got 'timm/{wrong}': did you mean {nearest}")) as caught:
        build_backbone(f"timm/{wrong}")
    assert "\n" not in str(caught.value)
    assert stand_in == []


def test_models_for_other_images_are_refused_in_one_line(stand_in: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"timm/assertive: expected a model for images of 112 x 112") as caught:
        build_backbone("timm/assertive")
    assert "Input size (112) doesn't match model (224)" in str(caught.value)
    with pytest.raises(ValueError, match=r"timm/not_pooled: .*its features have the shape \(8, 7, 7\)"):
        build_backbone("timm/not_pooled")
    with pytest.raises(TypeError, match="dropout"):
        build_backbone("timm/convnet_tiny", dropout=0.1)
    with pytest.raises(ValueError, match="embedding_size"):
        build_backbone("timm/convnet_tiny", embedding_size=0)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^timm/resnet18 needs timm, .* pip install .* -e '\.\[timm\]'$"):
        build_backbone("timm/resnet18")
    assert ModelConfig(backbone="timm/resnet18").backbone == "timm/resnet18"
    assert not any(name.startswith("timm") for name in names())


def test_a_timm_that_breaks_on_import_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\n')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ValueError, match=r"nms does not exist\): install the torchvision") as caught:
        build_backbone("timm/resnet18")
    assert "\n" not in str(caught.value)


def test_timm_is_imported_only_when_asked_for() -> None:
    """It takes seconds."""
    import subprocess

    code = "import sys, backbones; backbones.build_backbone('small'); print('timm' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


# ---- the genuine ones --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TIMM, reason="no timm, or no torchvision that fits this torch")
@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_model(name: str) -> None:
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(7)
        backbone = build_backbone(f"timm/{name}", embedding_size=16, recompute=share)
        assert backbone.parts()
        torch.manual_seed(8)
        embedding_BD = backbone(_images(3))
        assert embedding_BD.shape == (3, 16)
        embedding_BD.square().sum().backward()
        assert all(weight.grad is not None for weight in backbone.parameters() if weight.requires_grad)
        gradients = [weight.grad for weight in backbone.parameters() if weight.grad is not None]
        found.append([*gradients, *(buffer.clone() for buffer in backbone.buffers())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(not HAS_TIMM, reason="no timm, or no torchvision that fits this torch")
def test_a_genuine_name_is_suggested() -> None:
    with pytest.raises(ValueError, match="did you mean timm/convnext_tiny"):
        build_backbone("timm/convnxt_tiny")
