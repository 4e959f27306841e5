"""Arithmetic of a training: backbones against hooks that multiply out their layers, the head by hand, known peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backbones import IMAGE_SIZE, build_backbone
from configs.schema import HeadConfig, ModelConfig, RunConfig
from training.showing.flops import Work, forward_flops, peak_tflops

CPU = torch.device("cpu")


def _by_hooks(backbone: nn.Module) -> int:
    """Products and sums of one image's convolutions and linear layers, and of attention, from a real pass."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            per_place = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            total += 2 * output.numel() * per_place
        elif isinstance(module, nn.Linear):
            total += 2 * output.numel() * module.in_features
        elif type(module).__name__ == "_Attention":
            images, tokens, width = output.shape
            total += 2 * 2 * images * tokens * tokens * width

    hooks = [module.register_forward_hook(count) for module in backbone.modules()]
    with torch.no_grad():
        backbone(torch.zeros(2, 3, *IMAGE_SIZE))
    for hook in hooks:
        hook.remove()
    return total // 2


@pytest.mark.parametrize("name", ["small", "mobilefacenet", "iresnet18", "vit_t"])
@pytest.mark.parametrize("training", [True, False])
def test_backbones_are_counted(name: str, training: bool) -> None:
    """A ViT masks tokens in training only: there is less to do."""
    backbone = build_backbone(name, embedding_size=24).train(training)
    assert forward_flops(backbone) == _by_hooks(backbone)


def test_counting_changes_nothing() -> None:
    backbone = build_backbone("small", embedding_size=16)
    vit = build_backbone("vit_t", embedding_size=16)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(7)
    drawn = torch.get_rng_state()
    forward_flops(backbone)
    forward_flops(vit)  # which draws tokens to mask, and branches to drop
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.device == CPU


def test_a_network_that_looks_at_its_values_is_trained_without_a_count() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1] * self.weight if x.sum().item() > 0 else x

    work = Work.of(Odd(), RunConfig(), num_classes=10, device=CPU)
    assert work == Work(flops_per_image=None, peak=None)
    assert work.rates(100.0) == {}


def test_computing_blocks_again_is_no_work_of_the_model() -> None:
    plain, again = (build_backbone("iresnet18", embedding_size=16, recompute=share) for share in (0.0, 1.0))
    assert forward_flops(again) == forward_flops(plain)


@pytest.mark.parametrize(("rate", "subcentres"), [(1.0, 1), (0.25, 1), (1.0, 3)])
def test_the_head_counts_the_centres_that_take_part(rate: float, subcentres: int) -> None:
    backbone = build_backbone("small", embedding_size=20)
    config = RunConfig(
        model=ModelConfig(backbone="small", embedding_size=20),
        head=HeadConfig(sample_rate=rate, subcentres=subcentres),
    )
    work = Work.of(backbone, config, num_classes=1000, device=CPU)
    products = 3 * 2 * 20 * 1000 * subcentres * rate  # logits, gradient of the embedding, gradient of the centres
    assert work.flops_per_image == 3 * forward_flops(backbone) + products
    assert work.peak is None
    assert work.rates(50.0) == {"throughput/tflops": pytest.approx(50 * work.flops_per_image / 1e12)}


def test_mfu_is_the_share_of_the_peak() -> None:
    values = Work(flops_per_image=2e9, peak=100.0).rates(20_000.0)
    assert values == {"throughput/tflops": pytest.approx(40), "throughput/mfu": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 989, 67),
        ("NVIDIA H100 PCIe", 756, 756, 51),
        ("NVIDIA H100 NVL", 835, 835, 60),
        ("NVIDIA H200", 989, 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 312, 19.5),
        ("NVIDIA A10", 125, 125, 31.2),
        ("NVIDIA L40S", 362, 362, 91.6),
        ("NVIDIA L40", 181, 181, 90.5),
        ("NVIDIA L4", 121, 121, 30.3),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, 14),
        ("Tesla T4", None, 65, 8.1),
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA GH200 480GB", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
        ("", None, None, None),
    ],
)
def test_peaks_by_the_names_that_torch_gives(
    name: str, bf16: float | None, fp16: float | None, fp32: float | None
) -> None:
    assert [peak_tflops(name, precision) for precision in ("bf16", "fp16", "fp32")] == [bf16, fp16, fp32]
