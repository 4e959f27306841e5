"""Backbones equal the peers' recorded outputs, keep float32 under autocast, learn, and refuse what they cannot take."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones import Backbone, build_backbone, names, normalise_pixels
from backbones.iresnet import BLOCKS
from backbones.vit import VARIANTS

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors"
RECORDED = {"iresnet18": "r18", "iresnet50": "r50", "mobilefacenet": "mbf", "vit_t": "vit_t", "vit_s": "vit_s"}
TRAINED = ("iresnet18", "mobilefacenet", "small", "vit_t")
IRESNET_KEY = re.compile(
    r"(conv1|bn1|prelu|bn2|fc|features|layer[1-4]\.\d+\.(bn1|conv1|bn2|prelu|conv2|bn3|downsample\.[01]))\.\w+"
)


def _vector(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"backbone_{RECORDED[name]}.json").read_text(encoding="utf-8"))


def _weights(keys: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """The rule in the fixture's README."""
    weights = {}
    for key, shape in keys.items():
        g = np.random.default_rng(zlib.crc32(key.encode()) + seed)
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith("running_var"):
            value = g.uniform(0.5, 1.5, shape)
        elif len(shape) >= 2:
            value = g.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("weight"):
            value = g.uniform(0.2, 1, shape)
        else:
            value = 0.1 * g.standard_normal(shape)
        weights[key] = torch.from_numpy(np.asarray(value, np.float32))
    return weights


def _meta(name: str) -> Backbone:
    """Shapes only: the deep ones take seconds to fill with random numbers."""
    with torch.device("meta"):
        return build_backbone(name)


def _images(count: int) -> Tensor:
    return normalise_pixels(torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8))


# ---- the peers' numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_keys_and_shapes_are_the_peers(name: str) -> None:
    ours = {key: list(value.shape) for key, value in _meta(name).state_dict().items()}
    assert ours == _vector(name)["keys"]
    assert list(ours) == list(_vector(name)["keys"])


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_are_the_peers(name: str) -> None:
    vector = _vector(name)
    backbone = build_backbone(name).eval()
    backbone.load_state_dict(_weights(vector["keys"], vector["seed"]))
    x = torch.from_numpy(np.random.default_rng(7 + vector["seed"]).standard_normal((2, 3, 112, 112)))
    expected = torch.tensor(vector["output"], dtype=torch.float64)
    with torch.no_grad():
        single = backbone(x.float())
        double = backbone.double()(x)
    largest = expected.abs().max()
    # Relative to the largest component: what is left is the recorded 12 digits, and float32's rounding.
    rounding = 1e-11 if vector["dtype"] == "torch.float64" else 1e-5
    assert (double - expected).abs().max() < rounding * largest
    assert (single - expected).abs().max() < 1e-5 * largest


@pytest.mark.parametrize("name", VARIANTS)
def test_every_vit_has_the_recorded_keys_at_its_width_and_depth(name: str) -> None:
    """B, L and H were not recorded: they are S with more blocks or wider tokens."""
    recorded, v = _vector("vit_s")["keys"], VARIANTS[name]
    expected = {}
    for key, shape in recorded.items():
        wide = (
            shape
            if key.startswith("feature.3.")
            else [size // 512 * v.width if size % 512 == 0 else size for size in shape]
        )
        if key == "feature.2.weight":
            wide = [512, v.width]
        if not key.startswith("blocks."):
            expected[key] = wide
        elif key.startswith("blocks.0."):
            expected |= {key.replace("blocks.0.", f"blocks.{i}."): wide for i in range(v.depth)}
    assert {key: list(value.shape) for key, value in _meta(name).state_dict().items()} == expected


@pytest.mark.parametrize("depth", BLOCKS)
def test_every_depth_has_the_peers_keys_and_layers(depth: int) -> None:
    backbone = _meta(f"iresnet{depth}")
    assert all(IRESNET_KEY.fullmatch(key) for key in backbone.state_dict())
    convolutions = [name for name, part in backbone.named_modules() if isinstance(part, torch.nn.Conv2d)]
    projections = [name for name in convolutions if "downsample" in name]
    # The depth counts the stem, two convolutions a block, and the final linear layer.
    assert len(convolutions) - len(projections) + 1 == {18: 18, 34: 34, 50: 50, 100: 100, 200: 198}[depth]
    assert projections == [f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)]


def test_parameter_counts() -> None:
    counts = {name: sum(p.numel() for p in _meta(name).parameters()) / 1e6 for name in names()}
    assert {name: round(count, 1) for name, count in counts.items()} == {
        "iresnet18": 24.0,
        "iresnet34": 34.1,
        "iresnet50": 43.6,
        "iresnet100": 65.2,
        "iresnet200": 118.8,
        "mobilefacenet": 2.1,
        "small": 2.6,
        "vit_t": 19.1,
        "vit_t_dp005_mask0": 19.1,
        "vit_s": 76.0,
        "vit_s_dp005_mask_0": 76.0,
        "vit_b": 113.8,
        "vit_b_dp005_mask_005": 113.8,
        "vit_l": 255.7,
        "vit_l_dp005_mask_005": 255.7,
        "vit_h": 756.4,
    }


@pytest.mark.parametrize("name", RECORDED)
def test_parameter_counts_are_the_peers(name: str) -> None:
    """Of what they recorded, all but the statistics of BatchNorm is trained, or was meant to be."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    shapes = {key: shape for key, shape in _vector(name)["keys"].items() if not key.endswith(statistics)}
    assert sum(p.numel() for p in _meta(name).parameters()) == sum(int(np.prod(shape)) for shape in shapes.values())


# ---- in training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_weight(name: str) -> None:
    backbone = build_backbone(name, embedding_size=32)
    (backbone(_images(3)) * torch.randn(3, 32)).sum().backward()
    for key, weight in backbone.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, key
            assert torch.isfinite(weight.grad).all(), key
            assert weight.grad.abs().sum() > 0, key
    frozen = {key for key, weight in backbone.named_parameters() if not weight.requires_grad}
    assert frozen == ({"features.weight"} if name == "iresnet18" else set())


@pytest.mark.parametrize("name", TRAINED)
def test_embeddings_and_gradients_are_float32_under_autocast(name: str) -> None:
    backbone = build_backbone(name, embedding_size=32)
    images = _images(2)
    seen: list[torch.dtype] = []
    for part in backbone.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            part.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = backbone(images)
    assert embedding.dtype == torch.float32
    assert seen[0] == torch.bfloat16  # autocast did reach the body
    assert seen[-1] == torch.float32
    embedding.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in backbone.parameters() if weight.requires_grad)


@pytest.mark.parametrize("name", TRAINED)
def test_a_state_dict_carries_everything(name: str, tmp_path: Path) -> None:
    backbone, other = build_backbone(name, embedding_size=32), build_backbone(name, embedding_size=32)
    images = _images(4)
    backbone(images)  # moves the running statistics
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images), other.eval()(images))


@pytest.mark.parametrize("name", TRAINED)
def test_images_do_not_mix_in_evaluation(name: str) -> None:
    backbone = build_backbone(name, embedding_size=32).eval()
    images = _images(3)
    with torch.no_grad():
        together, alone = backbone(images), torch.cat([backbone(image[None]) for image in images])
        last_in_memory = backbone(images.contiguous(memory_format=torch.channels_last))
    assert torch.linalg.norm(together - alone) < 1e-5 * torch.linalg.norm(together)
    assert torch.linalg.norm(together - last_in_memory) < 1e-5 * torch.linalg.norm(together)


@pytest.mark.parametrize("name", ["iresnet100", "mobilefacenet", "small", "vit_t"])
def test_an_untrained_network_evaluates_to_finite_embeddings(name: str) -> None:
    with torch.no_grad():
        embedding = build_backbone(name).eval()(_images(1))
    assert embedding.abs().max() < 1e5


def test_the_small_one_tells_pictures_apart_after_a_few_steps() -> None:
    backbone = build_backbone("small", embedding_size=16)
    patterns = torch.rand(8, 3, 14, 14).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    labels = torch.arange(8).repeat(4)
    head = torch.nn.Linear(16, 8)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3)
    losses = []
    for _ in range(12):
        images = (patterns[labels] + 0.3 * torch.randn(32, 3, 112, 112)).clamp(-1, 1)
        loss = torch.nn.functional.cross_entropy(head(backbone(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_dropout_acts_in_training_only() -> None:
    backbone = build_backbone("iresnet18", embedding_size=8, dropout=0.5).eval()
    images = _images(2)
    with torch.no_grad():
        assert torch.equal(backbone(images), backbone(images))
        backbone.dropout.train()
        assert not torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
def test_normalised_pixels(format_: torch.memory_format) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16).contiguous(memory_format=format_)
    x = normalise_pixels(pixels)
    torch.testing.assert_close(x, (pixels.double() / 255 * 2 - 1).float(), atol=1e-7, rtol=0)
    assert x.min() == -1
    assert x.max() == 1
    assert x.is_contiguous(memory_format=format_)
    assert pixels.dtype == torch.uint8


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilefacenet", "small"])
@pytest.mark.parametrize("shape", [(2, 3, 112, 96), (2, 1, 112, 112), (3, 112, 112), (2, 3, 224, 224)])
def test_images_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(B, 3, 112, 112\).*got.*{re.escape(str(shape))}"):
        build_backbone(name)(torch.zeros(shape))


def test_pixels_that_are_not_normalised_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8.*normalise_pixels"):
        build_backbone("small")(torch.zeros(1, 3, 112, 112, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("iresnet51", "iresnet50"), ("mobilefacnet", "mobilefacenet"), ("Small", "small"), ("r100", "iresnet100")],
)
def test_an_unknown_name_lists_the_names_and_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{', '.join(names())}, got '{wrong}': did you mean {nearest}"):
        build_backbone(wrong)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout: expected 0 <= dropout < 1, got 1"):
        build_backbone("iresnet18", dropout=1.0)
    with pytest.raises(ValueError, match="embedding_size: expected at least 1, got 0"):
        build_backbone("small", embedding_size=0)
    for wrong in ({"drop_path": 1.0}, {"mask_ratio": -0.1}, {"mask_ratio": 0.999}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}: expected"):
            build_backbone("vit_t", **wrong)
    with pytest.raises(TypeError, match="dropout"):
        build_backbone("small", dropout=0.1)
