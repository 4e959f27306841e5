"""Blocks that are computed again in backward: the same bits, less kept, and BatchNorm's statistics move once."""

from __future__ import annotations

import copy
import functools
import re
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from backbones import Backbone, build_backbone
from backbones.iresnet import BLOCKS, IResNet
from backbones.recompute import Part, recompute
from backbones.vit import VisionTransformer
from benchmarks.planning.activations import Bytes, bytes_per_image
from configs.schema import ConfigError, ModelConfig

NETS = ("iresnet10", "mobilefacenet", "small", "vit")
"""Two of them with fewer and narrower blocks than any that has a name."""


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _build(name: str, share: float, *, drop_path: float = 0.3, mask_ratio: float = 0.2) -> Backbone:
    torch.manual_seed(3)
    if name == "vit":
        made: Backbone = VisionTransformer(64, 5, embedding_size=8, drop_path=drop_path, mask_ratio=mask_ratio)
    elif name == "iresnet10":
        with mock.patch.dict(BLOCKS, {10: (1, 1, 1, 1)}):
            made = IResNet(10, embedding_size=8)
    else:
        return build_backbone(name, embedding_size=8, recompute=share)
    recompute(made.parts(), share)
    return made


def _trained(backbone: Backbone, *, dtype: torch.dtype | None = None, steps: int = 1) -> dict[str, Tensor]:
    """Embeddings, gradients and buffers after two passes, and torch's random state."""
    torch.manual_seed(4)
    out: dict[str, Tensor] = {}
    for step in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            embedding_BD = backbone(_images(2))
        embedding_BD.square().sum().backward()  # gradients add up, as by accumulation
        out[f"embedding {step}"] = embedding_BD.detach()
    out |= {f"gradient of {name}": w.grad for name, w in backbone.named_parameters() if w.grad is not None}
    out |= {f"buffer {name}": buffer.clone() for name, buffer in backbone.named_buffers()}
    return {**out, "random": torch.get_rng_state()}


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@functools.cache
def _plain(name: str, dtype: torch.dtype | None, steps: int) -> dict[str, Tensor]:
    return _trained(_build(name, 0), dtype=dtype, steps=steps)


@pytest.mark.parametrize(
    ("name", "share", "steps"), [(name, 1, 1) for name in NETS] + [("small", 0.4, 2), ("vit", 0.4, 2), ("vit", 1, 2)]
)
def test_gradients_buffers_and_random_numbers_are_the_same_bits(name: str, share: float, steps: int) -> None:
    plain = _plain(name, None, steps)
    assert any(name.startswith("gradient") for name in plain)
    assert _differing(_trained(_build(name, share), steps=steps), plain) == []


@pytest.mark.parametrize("name", ["small", "vit"])
def test_under_autocast_too(name: str) -> None:
    plain = _plain(name, torch.bfloat16, 1)
    assert _differing(_trained(_build(name, 1), dtype=torch.bfloat16), plain) == []


def test_blocks_that_images_skip_are_skipped_again() -> None:
    """A half of them at the last block: without the state of the random numbers nothing would agree."""
    again, plain = (_trained(_build("vit", share, drop_path=0.5, mask_ratio=0.4)) for share in (1, 0))
    assert _differing(again, plain) == []


def test_statistics_move_once() -> None:
    backbone = _build("iresnet10", 1)
    backbone(_images(2)).sum().backward()
    counts = {name: int(buffer) for name, buffer in backbone.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counts) > 15
    assert set(counts.values()) == {1}


def test_a_batch_norm_that_is_set_to_evaluation_keeps_its_own() -> None:
    found = []
    for share in (0, 1):
        backbone = _build("small", share)
        frozen = backbone.blocks[0].bn1
        frozen.eval()
        frozen.running_mean.fill_(0.2)
        found.append(_trained(backbone, steps=2))
    assert _differing(*found) == []
    assert (found[1]["buffer blocks.0.bn1.running_mean"] == 0.2).all()


def test_the_tensors_of_the_statistics_are_the_same_ones() -> None:
    """`training.undo` and DDP hold on to them; also after a backward that fails."""
    backbone = _build("small", 1)
    before = [(name, buffer, buffer.data_ptr()) for name, buffer in backbone.named_buffers()]
    backbone(_images(2)).sum().backward()
    embedding_BD = backbone(_images(2))

    def fail(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        raise RuntimeError("planted")

    backbone.blocks[1].conv2.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        embedding_BD.sum().backward()
    after = list(backbone.named_buffers())
    assert [(name, buffer.data_ptr()) for name, buffer in after] == [(name, address) for name, _, address in before]
    assert all(one is other for (_, one, _), (_, other) in zip(before, after, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_names_and_evaluation_stay(name: str) -> None:
    again, plain = _build(name, 1).eval(), _build(name, 0).eval()
    assert list(again.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in again.named_parameters()] == [key for key, _ in plain.named_parameters()]
    with torch.no_grad():
        assert torch.equal(again(_images(2)), plain(_images(2)))
    before = {key: value.clone() for key, value in again.state_dict().items()}
    again(_images(2)).sum().backward()  # gradients in evaluation: nothing to take care of
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())


def test_a_copy_computes_its_own_weights_again() -> None:
    first = _build("iresnet10", 1)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for weight in first.parameters():
            weight.zero_()
    assert _differing(_trained(second), _plain("iresnet10", None, 1)) == []


# ---- memory ------------------------------------------------------------------------------------------------------


def _kept(backbone: Backbone, images_B3HW: Tensor) -> int:
    """Bytes that autograd saves in a real forward, but for weights and images: counted by hand."""
    own = {t.untyped_storage().data_ptr() for t in (*backbone.parameters(), *backbone.buffers(), images_B3HW)}
    found: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        embedding_BD = backbone(images_B3HW)
    assert embedding_BD.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(("name", "least"), [("iresnet10", 6), ("mobilefacenet", 2), ("vit", 4)])
def test_less_is_kept_in_a_real_forward(name: str, least: float) -> None:
    whole, half, none = (_kept(_build(name, share), _images(2)) for share in (1, 0.5, 0))
    assert none > least * whole
    assert whole < half < none


def _counted(name: str, share: float) -> Bytes:
    return bytes_per_image(partial(_build, name, share))


def test_what_is_counted_from_shapes_is_what_a_real_forward_keeps() -> None:
    for share in (0, 1):
        few, many = (_kept(_build("small", share), _images(count)) for count in (2, 4))
        assert _counted("small", share).kept == pytest.approx((many - few) / 2, abs=1)


def test_what_is_kept_is_the_input_of_each_block() -> None:
    """Of an IResNet with a block in each stage, for each image: 112, 56, 28, 14 and 7 places on each side."""
    x = [(64, 112), (64, 56), (128, 28), (256, 14)]  # into each block
    after = [(512, 7), (512, 7)]  # into the last BatchNorm, and out of it into the linear layer
    head = 8  # into BatchNorm; dropout of 0 keeps nothing
    floats = sum(channels * side**2 for channels, side in [*x, *after]) + head
    assert _counted("iresnet10", 1).kept == pytest.approx(4 * floats, abs=1)


@pytest.mark.parametrize("name", ["iresnet10", "vit"])
def test_the_peak_falls_too(name: str) -> None:
    again, plain = _counted(name, 1), _counted(name, 0)
    assert plain.kept < plain.peak
    assert again.kept < again.peak
    assert again.peak < 0.7 * plain.peak


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"recompute: expected 0 to 1, a share of the blocks, got {share}")):
        build_backbone("small", recompute=share)
    with pytest.raises(ConfigError, match=r"model\.recompute: expected 0 to 1"):
        ModelConfig(recompute=share)


def test_a_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute: expected 0, as this backbone has no blocks"):
        recompute([], 0.5)
    recompute([], 0)


def test_the_first_share_of_the_parts_rounded_up_is_taken() -> None:
    parts = [Part(nn.ReLU()) for _ in range(5)]
    recompute(parts, 0.5)
    assert ["forward" in part.module.__dict__ for part in parts] == [True] * 3 + [False] * 2
