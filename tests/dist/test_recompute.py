"""Blocks computed again, and a compiled body, in whole optimizer steps under DDP: the same training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones import Backbone, build_backbone
from backbones.recompute import recompute
from backbones.vit import VisionTransformer
from configs.schema import ClusteringConfig, HeadConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from tests.ranks import WORLD_SIZES, RankPool, ranks_of
from training.distributed import data_parallel
from training.optim import build_optimizers
from training.step import TrainStep

CPU = torch.device("cpu")
CLASSES, MICRO = 5, 3
LABELS = np.arange(60) % CLASSES


class Run:
    """A rank's part of a small training of a real backbone."""

    def __init__(self, group: dist.ProcessGroup, name: str, share: float, backend: str = "", precision: str = "fp32"):
        self.ranks = ranks_of(group)
        config = RunConfig(
            head=HeadConfig(scale=16.0, margin=0.3),
            clustering=ClusteringConfig(enabled=False),
            optim=OptimConfig(lr=0.05, reference_batch=0),
            train=TrainConfig(precision=precision),  # type: ignore[arg-type]
        )
        torch.manual_seed(5)
        if name == "vit":
            self.net: Backbone = VisionTransformer(64, 4, embedding_size=8, drop_path=0.4, mask_ratio=0.2)
            recompute(self.net.parts(), share)
        else:
            self.net = build_backbone(name, embedding_size=8, recompute=share)
        start = copy.deepcopy(self.net.state_dict())
        self.backbone = data_parallel(self.net, self.ranks)
        assert all(torch.equal(start[key], value) for key, value in self.net.state_dict().items())
        if backend:
            self.net.compile_body(backend=backend)
        head = PartialFCHead(num_classes=CLASSES, embedding_size=8, config=config.head, group=group, seed=1)
        self.optimizers = build_optimizers(
            self.backbone.parameters(), head.parameters(), config.optim, config.head, seed=0
        )
        self.train_step = TrainStep(
            backbone=self.backbone, head=head, service=None, optimizers=self.optimizers, config=config, device=CPU
        )
        torch.manual_seed(100 + self.ranks.rank)

    def step(self, step: int, *, micro_batches: int = 2) -> dict[str, Any]:
        """Weights, buffers, gradients and loss after it."""
        batches = []
        for micro in range(micro_batches):
            first = ((step * micro_batches + micro) * self.ranks.world_size + self.ranks.rank) * MICRO
            ids = (torch.arange(MICRO) + first) % len(LABELS)
            pixels = torch.Generator().manual_seed(first)
            images = torch.randint(0, 256, (MICRO, 112, 112, 3), generator=pixels, dtype=torch.uint8).permute(
                0, 3, 1, 2
            )
            batches.append(Batch(images, torch.from_numpy(LABELS)[ids], ids))
        values = self.train_step(batches, step=step, lr=0.05)
        gradients = {f"gradient {name}": w.grad for name, w in self.net.named_parameters() if w.grad is not None}
        momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(self.optimizers[0].state.values())}
        state = {**self.net.state_dict(), **gradients, **momenta, "loss": values.total, "skipped": values.skipped}
        return copy.deepcopy(state)


def _steps(group: dist.ProcessGroup, name: str, share: float, backend: str, precision: str) -> dict[str, Tensor]:
    run = Run(group, name, share, backend, precision)
    run.step(0)
    return run.step(1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "precision"), [("small", "fp32"), ("small", "bf16")])
def test_training_is_the_same_bits(ranks: RankPool, world_size: int, name: str, precision: str) -> None:
    """With accumulation, so that a backward pass without DDP's sums is among them."""
    plain = ranks.run(world_size, _steps, name, 0.0, "", precision)
    again = ranks.run(world_size, _steps, name, 1.0, "", precision)
    for one, other in zip(plain, again, strict=True):
        assert one.keys() == other.keys()
        assert len(one) > 40
        assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []
        assert other["skipped"] == 0


def test_blocks_that_images_skip_are_skipped_again_on_two_ranks(ranks: RankPool) -> None:
    plain = ranks.run(2, _steps, "vit", 0.0, "", "fp32")
    again = ranks.run(2, _steps, "vit", 1.0, "", "fp32")
    for one, other in zip(plain, again, strict=True):
        assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


def _skipped(group: dist.ProcessGroup, share: float) -> list[str]:
    """What a step changes whose loss is not finite on the last rank."""
    run = Run(group, "small", share)
    before = run.step(0)
    if run.ranks.rank == run.ranks.world_size - 1:
        run.net.stem.register_forward_pre_hook(lambda _module, images: (images[0] * torch.nan,))
    after = run.step(1)
    assert after["skipped"] == 1
    return [
        name
        for name, value in before.items()
        if not name.startswith(("gradient", "loss", "skipped")) and not torch.equal(value, after[name])
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES[:2])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_step_that_is_not_finite_moves_nothing(ranks: RankPool, world_size: int, share: float) -> None:
    assert ranks.run(world_size, _skipped, share) == [[]] * world_size


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_compiled_body_trains_alike_on_two_ranks(ranks: RankPool, share: float) -> None:
    plain = ranks.run(2, _steps, "small", 0.0, "", "fp32")
    compiled = ranks.run(2, _steps, "small", share, "aot_eager", "fp32")
    for one, other in zip(plain, compiled, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.allclose(other[key].double(), value.double(), rtol=1e-3, atol=1e-4), key
        for key, value in compiled[0].items():
            if key.startswith(("momentum", "gradient")):
                assert torch.equal(value, compiled[1][key]), "all ranks hold the same bits"
