"""An optimizer step as a whole: the same weights on 1, 2 and 4 ranks, and the gradient of the global mean."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import Backbone, build_backbone
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, HeadConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead, initial_centres
from partial_fc.reference import dense_margin_softmax
from sharding import all_shards
from tests.ranks import WORLD_SIZES, RankPool, ranks_of
from training.distributed import data_parallel
from training.optim import build_optimizers
from training.step import TrainStep

CPU = torch.device("cpu")
CLASSES, GLOBAL, STEPS, PER_EPOCH = 11, 24, 12, 3
NUM_SAMPLES = GLOBAL * PER_EPOCH
LABELS = np.arange(NUM_SAMPLES) % CLASSES


class Toy(Backbone):
    """Without BatchNorm, whose statistics are those of one rank's images, ranks must agree to the last digits."""

    def __init__(self) -> None:
        super().__init__(embedding_size=6)
        self.convolution = nn.Conv2d(3, 4, 16, stride=16)
        self.linear = nn.Linear(4 * 49, 6)

    def body(self, images_B3HW: Tensor) -> Tensor:
        return torch.tanh(self.convolution(images_B3HW))

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.linear(features_BCHW.flatten(1))


def _images(samples: list[int]) -> Tensor:
    """A pattern for each class, with noise: uint8 (B, 3, 112, 112), channels last as loaders give them."""
    rows = []
    for sample in samples:
        pattern = np.random.default_rng(int(LABELS[sample])).integers(0, 200, (7, 7, 3)).repeat(16, 0).repeat(16, 1)
        rows.append(pattern + np.random.default_rng(1000 + sample).integers(0, 56, (112, 112, 3)))
    return torch.from_numpy(np.stack(rows).astype(np.uint8)).permute(0, 3, 1, 2)


def _batches(rank: int, world_size: int, accumulation: int, step: int) -> list[Batch]:
    """The rank's part of the global batch of a step, cut into micro-batches; the same images for any cut."""
    samples = [step % PER_EPOCH * GLOBAL + row for row in range(GLOBAL)]
    batches = []
    size = GLOBAL // accumulation // world_size
    for micro in range(accumulation):
        start = micro * GLOBAL // accumulation + rank * size
        ids = samples[start : start + size]
        batches.append(Batch(_images(ids), torch.from_numpy(LABELS[ids]), torch.tensor(ids)))
    return batches


def _train(
    group: dist.ProcessGroup, accumulation: int, clusters: bool, steps: int, left_out: int = -1
) -> dict[str, Any]:
    """left_out: a class whose rows the service takes out of the margin softmax."""
    ranks = ranks_of(group)
    config = RunConfig(
        head=HeadConfig(scale=16.0, margin=0.3),
        clustering=ClusteringConfig(
            enabled=clusters,
            margin_low=0.1,
            margin_high=0.5,
            warmup_fraction=0.0,
            ramp_fraction=0.0,
            refresh_span=0.3,
        ),
        optim=OptimConfig(lr=0.05, reference_batch=0),
        train=TrainConfig(precision="fp32"),
    )
    torch.manual_seed(5)
    toy = Toy()
    start = copy.deepcopy(toy.state_dict())
    backbone = data_parallel(toy, ranks)
    assert all(torch.equal(start[key], value) for key, value in toy.state_dict().items()), "building changes nothing"
    head = PartialFCHead(num_classes=CLASSES, embedding_size=6, config=config.head, group=group, seed=1)
    service = None
    if clusters:
        service = ClusterService(
            labels=LABELS,
            num_classes=CLASSES,
            dim=6,
            group=group,
            device=CPU,
            config=config.clustering,
            margin=config.head.margin,
            total_steps=steps,
            steps_per_epoch=PER_EPOCH,
            bank_dtype=torch.float32,
        )
        service.for_head = lambda batch: dataclasses.replace(
            batch, labels_N=torch.where(batch.labels_N == left_out, -1, batch.labels_N)
        )
    optimizers = build_optimizers(backbone.parameters(), head.parameters(), config.optim, config.head, seed=0)
    train_step = TrainStep(
        backbone=backbone, head=head, service=service, optimizers=optimizers, config=config, device=CPU
    )
    losses = []
    for step in range(steps):
        values = train_step(_batches(ranks.rank, ranks.world_size, accumulation, step), step=step, lr=0.05)
        losses.append([values.total.item(), values.contrastive.item(), values.gradient_norm.item()])
    gradients = {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}
    return {
        "weights": toy.state_dict(),
        "gradients": gradients,
        "centres": head.weight.detach(),
        "losses": losses,
        "version": 0 if service is None else service.version,
    }


@pytest.mark.parametrize("clusters", [False, True])
def test_any_number_of_ranks_trains_the_same_weights(ranks: RankPool, clusters: bool) -> None:
    (one,) = ranks.run(1, _train, 1, clusters, STEPS)
    assert one["losses"][-1][0] < one["losses"][0][0]
    assert (one["version"] >= 2) == clusters
    assert (one["losses"][-1][1] > 0) == clusters
    for world_size in WORLD_SIZES[1:]:
        parts = ranks.run(world_size, _train, 1, clusters, STEPS)
        centres = torch.cat([part["centres"] for part in parts])
        assert torch.allclose(centres, one["centres"], rtol=1e-3, atol=1e-5)
        for part in parts:
            assert np.allclose(part["losses"], one["losses"], rtol=1e-4)
            for name, value in one["weights"].items():
                assert torch.allclose(part["weights"][name], value, rtol=1e-3, atol=1e-5), name
                assert torch.equal(part["weights"][name], parts[0]["weights"][name]), "all ranks hold the same bits"


def _without_a_class(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Movement of the centres in one step, whose labels say that class 3 is no example; and where they began."""
    moved = _train(group, 1, True, 1, 3)["centres"]
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    own = all_shards(world_size, CLASSES)[rank]
    return moved, initial_centres(own.start, own.stop, 6, 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_that_the_service_leaves_out_are_no_examples_of_their_class(ranks: RankPool, world_size: int) -> None:
    """Class 3 is then only pushed away: its centre moves by a gradient that no row of its own has a part in."""
    parts = ranks.run(world_size, _without_a_class)
    moved, start = (torch.cat(list(pieces)) for pieces in zip(*parts, strict=True))
    torch.manual_seed(5)
    toy = Toy()
    (batch,) = _batches(0, 1, 1, 0)
    kept_B = batch.labels != 3
    w_CD = start.clone().requires_grad_()
    x_BD = toy((batch.images.float() - 127.5) / 127.5).detach()
    margins_C = torch.full((CLASSES,), 0.3)
    dense_margin_softmax(x_BD[kept_B], w_CD, batch.labels[kept_B], margins_C, scale=16.0).backward()
    assert w_CD.grad is not None
    expected = start - 0.05 * (w_CD.grad + OptimConfig().weight_decay * start)
    assert (w_CD.grad[3] != 0).any()
    assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-6)


def _gradients(group: dist.ProcessGroup, accumulation: int) -> dict[str, Tensor]:
    return _train(group, accumulation, False, 1)["gradients"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_gradient_is_that_of_the_global_mean(ranks: RankPool, world_size: int) -> None:
    """Accumulation averages the micro-batches' means: equal parts, so the same gradient. Clipped to a norm of 5."""
    torch.manual_seed(5)
    toy = Toy().double()
    (batch,) = _batches(0, 1, 1, 0)
    x_BD = toy((batch.images.double() - 127.5) / 127.5)
    centres = initial_centres(0, CLASSES, 6, 1).double()
    margins_C = torch.full((CLASSES,), 0.3, dtype=torch.float64)
    dense_margin_softmax(x_BD, centres, batch.labels, margins_C, scale=16.0).backward()
    norm = torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None]).norm()
    for accumulation in (1, 2):
        for found in ranks.run(world_size, _gradients, accumulation):
            for name, p in toy.named_parameters():
                assert p.grad is not None
                truth = p.grad * min(1.0, 5.0 / float(norm))
                assert torch.linalg.norm(found[name] - truth) < 1e-5 * torch.linalg.norm(truth), name


def _same_step_twice(group: dist.ProcessGroup) -> list[bool]:
    """The first and the second backward of DDP, on the same batch: its gradients, bit by bit."""
    ranks = ranks_of(group)
    torch.manual_seed(7)
    backbone = data_parallel(build_backbone("small", embedding_size=32), ranks)
    images = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(ranks.rank))
    found = []
    for _ in range(2):
        backbone.zero_grad(set_to_none=True)
        backbone(images).square().sum().backward()
        found.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    return [torch.equal(first, second) for first, second in zip(*found, strict=True)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_first_step_of_a_process_rounds_as_its_later_ones(ranks: RankPool, world_size: int) -> None:
    """Or a resumed run would leave the bits of one that was never stopped: DDP lays its buckets out anew once."""
    for same in ranks.run(world_size, _same_step_twice):
        assert len(same) > 15
        assert all(same)
