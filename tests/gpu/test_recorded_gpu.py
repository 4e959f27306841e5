"""`model.graph`: steps whose backbone is replayed from CUDA graphs are those without. Skipped without a GPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import build_backbone, normalise_pixels
from backbones.recorded import Recorded
from configs.schema import ClusteringConfig, ConfigError, ModelConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks, data_parallel
from training.optim import build_optimizers
from training.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CLASSES, ROWS = 1000, 32


@pytest.fixture(scope="module")
def gpu() -> Iterator[Ranks]:
    device = torch.device("cuda", 0)
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield Ranks(rank=0, world_size=1, device=device, group=dist.group.WORLD, store=store)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _float32_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each."""
    counted: list[int] = []
    replay = Recorded.__call__

    def call(recorded: Recorded, images_B3HW: Tensor) -> Tensor:
        counted.append(len(images_B3HW))
        return replay(recorded, images_B3HW)

    monkeypatch.setattr(Recorded, "__call__", call)
    return counted


class Run:
    """A backbone, its head and their step, from the same seed each time."""

    def __init__(self, ranks: Ranks, name: str, precision: Any, *, graph: bool) -> None:
        config = RunConfig(
            model=ModelConfig(graph=graph),
            clustering=ClusteringConfig(enabled=False),
            optim=OptimConfig(reference_batch=0),
            train=TrainConfig(precision=precision, batch_size=ROWS),
        )
        torch.manual_seed(0)
        self.net = build_backbone(name, embedding_size=32).to(ranks.device)
        self.model = data_parallel(self.net, ranks)
        self.head = PartialFCHead(
            num_classes=CLASSES, embedding_size=32, config=config.head, group=ranks.group, seed=0
        ).to(ranks.device)
        optimizers = build_optimizers(
            self.model.parameters(), self.head.parameters(), config.optim, config.head, seed=0
        )
        self.train_step = TrainStep(
            backbone=self.model, head=self.head, service=None, optimizers=optimizers, config=config,
            device=ranks.device,
        )  # fmt: skip
        if self.train_step.loss_scale is not None:
            self.train_step.loss_scale.factor.fill_(64)  # small enough for the first step
        if graph:
            self.train_step.record(ROWS)
        self.bad = False
        self.model.register_forward_pre_hook(lambda _, args: (args[0] * (torch.nan if self.bad else 1.0),))

    def step(self, step: int, *, bad: bool = False) -> Any:
        self.bad = bad
        return self.train_step([batch_of(step)], step=step, lr=0.01)

    def state(self) -> dict[str, Tensor]:
        return copy.deepcopy({**self.net.state_dict(), "head.weight": self.head.weight.detach()})


def batch_of(seed: int) -> Batch:
    """On the GPU, channels last in memory, as loaders give them."""
    draw = torch.Generator().manual_seed(seed)
    images_BHW3 = torch.randint(0, 256, (ROWS, 112, 112, 3), generator=draw, dtype=torch.uint8).cuda()
    labels_B = torch.randint(0, CLASSES, (ROWS,), generator=draw).cuda()
    return Batch(images_BHW3.permute(0, 3, 1, 2), labels_B, torch.arange(ROWS).cuda() + 100 * seed)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor], kind: str) -> float:
    """Of all weights, or all statistics, together: how far the found ones are off, in lengths of the way they went."""
    names = [name for name in before if ("running" in name) == (kind == "statistics") and "num_batches" not in name]

    def way(to: dict[str, Tensor], since: dict[str, Tensor]) -> Tensor:
        return torch.cat([(to[name] - since[name]).double().flatten() for name in names]).norm()

    return float(way(found, expected) / way(expected, before))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["small", "iresnet18"])
def test_steps_are_those_without(gpu: Ranks, replays: list[int], name: str, precision: str) -> None:
    results = []
    for graph in (False, True):
        run = Run(gpu, name, precision, graph=graph)
        before = run.state()
        losses = [run.step(step) for step in range(4)]
        assert [values.skipped.item() for values in losses] == [0] * 4
        results.append((torch.stack([values.total for values in losses]), run.state(), before))
    assert len(replays) == 4
    (plain_losses, plain, start), (losses, found, start_too) = results
    assert all(torch.equal(value, start_too[key]) for key, value in start.items()), "recording moved something"
    torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=0)
    limit = 1e-3 if precision == "fp32" else 5e-2
    assert apart(found, plain, start, "weights") < limit
    assert apart(found, plain, start, "statistics") < limit
    counts = {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")}
    assert counts == {4}


def test_random_numbers_are_those_without_and_new_ones_each_time(gpu: Ranks, replays: list[int]) -> None:
    """vit_t drops patches and branches."""
    first = [Run(gpu, "vit_t", "bf16", graph=graph).step(0).total for graph in (False, True)]
    torch.testing.assert_close(first[1], first[0], rtol=1e-3, atol=0)
    run = Run(gpu, "vit_t", "bf16", graph=True)
    images = normalise_pixels(batch_of(0).images)
    embeddings = [run.net(images).detach().clone() for _ in range(2)]
    assert len(replays) == 3
    assert not torch.equal(*embeddings)


def embedded(net: nn.Module, images: Tensor) -> Tensor:
    net.eval()
    with torch.no_grad():
        out: Tensor = net(images)
    net.train()
    return out


def test_evaluation_between_steps_sees_what_was_learnt(gpu: Ranks, replays: list[int]) -> None:
    run = Run(gpu, "small", "bf16", graph=True)
    images = normalise_pixels(batch_of(50).images)
    seen = [embedded(run.net, images)]
    for step in range(2):
        run.step(step)
        other = build_backbone("small", embedding_size=32).to(gpu.device, memory_format=torch.channels_last)
        other.load_state_dict(run.net.state_dict())
        seen.append(embedded(run.net, images))
        torch.testing.assert_close(seen[-1], embedded(other, images), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(seen[-1], seen[-2], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(embedded(copy.deepcopy(run.net), images), seen[-1], rtol=1e-5, atol=1e-5)
    assert len(replays) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_skipped_step_moves_nothing(gpu: Ranks, replays: list[int], precision: str, first: int) -> None:
    run = Run(gpu, "small", precision, graph=True)
    for step in range(first):
        run.step(step)
    before = run.state()
    assert run.step(first, bad=True).skipped.item() == 1
    assert all(torch.equal(before[key], value) for key, value in run.state().items())
    assert run.step(first + 1).skipped.item() == 0
    moved = run.state()
    assert not torch.equal(moved["stem.weight"], before["stem.weight"])
    assert all(value.isfinite().all() for value in moved.values() if value.is_floating_point())
    assert len(replays) == first + 2


def test_no_host_waits(gpu: Ranks, replays: list[int]) -> None:
    run = Run(gpu, "iresnet18", "bf16", graph=True)
    for step in range(3):
        run.step(step)
    prepared = [batch_of(step) for step in range(3, 6)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(prepared, start=3):
            run.train_step([batch], step=step, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 6


def _refused(_process: int) -> None:
    device, store = torch.device("cuda", 0), dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    group: Any = dist.group.WORLD
    run = Run(Ranks(rank=0, world_size=1, device=device, group=group, store=store), "small", "bf16", graph=False)
    body = run.net.body
    run.net.body = lambda images: body(images) * float(images.mean().item() < 9)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"model\.graph: expected a backbone .*: set it to false") as caught:
        run.train_step.record(ROWS)
    assert "\n" not in str(caught.value)
    os._exit(0)  # what a recording that failed has left behind need not end well


def test_a_network_that_waits_for_the_host_is_refused() -> None:
    torch.multiprocessing.spawn(_refused)
