"""On a GPU a step that is not finite moves nothing, and no host waits to learn it. Skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones import build_backbone
from configs.schema import ClusteringConfig, GuardConfig, HeadConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks, data_parallel
from training.guard import Guard
from training.optim import build_optimizers
from training.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CLASSES, ROWS = 1000, 32


class Run:
    def __init__(self, ranks: Ranks, *, name: Any = "sgd", precision: Any = "bf16", **head: Any) -> None:
        config = RunConfig(
            head=HeadConfig(**head),
            clustering=ClusteringConfig(enabled=False),
            optim=OptimConfig(name=name, lr=0.05, reference_batch=0),
            train=TrainConfig(precision=precision),
        )
        torch.manual_seed(0)
        self.net = build_backbone("small", embedding_size=32).to(ranks.device)
        backbone = data_parallel(self.net, ranks)
        self.head = PartialFCHead(
            num_classes=CLASSES, embedding_size=32, config=config.head, group=ranks.group, seed=0
        ).to(ranks.device)
        self.optimizers = build_optimizers(
            backbone.parameters(), self.head.parameters(), config.optim, config.head, seed=0
        )
        self.train_step = TrainStep(
            backbone=backbone, head=self.head, service=None, optimizers=self.optimizers, config=config,
            device=ranks.device,
        )  # fmt: skip
        self.bad = False
        self.net.register_forward_pre_hook(lambda _, args: (args[0] * (torch.nan if self.bad else 1.0),))

    def step(self, step: int, *, bad: bool = False) -> Any:
        self.bad = bad
        draw = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (ROWS, 3, 112, 112), generator=draw, dtype=torch.uint8).cuda()
        labels = torch.randint(0, CLASSES, (ROWS,), generator=draw).cuda()
        return self.train_step([Batch(images, labels, torch.arange(ROWS).cuda() + 100 * step)], step=step, lr=0.05)

    def bits(self) -> dict[str, Any]:
        found: dict[str, Any] = {**self.net.state_dict()}
        found |= {f"head.{name}": value for name, value in self.head.state_dict().items() if isinstance(value, Tensor)}
        for number, optimizer in enumerate(self.optimizers):
            for name, state in optimizer.state_dict()["state"].items():
                found |= {f"{number}.{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return copy.deepcopy(found)


@pytest.fixture(scope="module")
def gpu() -> Any:
    device = torch.device("cuda", 0)
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield Ranks(rank=0, world_size=1, device=device, group=dist.group.WORLD, store=store)  # type: ignore[arg-type]
    dist.destroy_process_group()


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"name": "adamw"},
    "bf16 centres, sampled": {"centre_dtype": "bf16", "sample_rate": 0.3},
    "catching up": {"missed_steps": "catch_up", "sample_rate": 0.3},
    "adaface, in torch": {"loss": "adaface", "impl": "torch", "precision": "fp32"},
    "half precision": {"precision": "fp16"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("first", [0, 3])
def test_a_skipped_step_moves_nothing(gpu: Ranks, name: str, first: int) -> None:
    """first: the step that is skipped; of the very first one fused SGD would keep what lay in memory."""
    run = Run(gpu, **SETTINGS[name])
    for step in range(first):
        run.step(step)
    before = run.bits()
    assert run.step(first, bad=True).skipped.item() == 1
    after = run.bits()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(after[key].any() for key in after.keys() - before.keys()), "state that has begun is zero"
    tries = 8 if name == "half precision" else 1  # its first scale is too large
    following = (run.step(first + number) for number in range(1, 1 + tries))
    assert any(values.skipped.item() == 0 for values in following)
    moved = run.bits()
    assert not torch.equal(moved["head.weight"], after["head.weight"])
    assert all(value.isfinite().all() for value in moved.values() if value.is_floating_point())


def test_no_host_waits_and_the_guard_hears_of_it_four_steps_later(gpu: Ranks) -> None:
    run = Run(gpu)
    lines: list[str] = []
    names = [name for name, _ in run.net.named_parameters()]
    guard = Guard(GuardConfig(), parameters=names, ranks=gpu, say=lines.append)
    for step in range(3):
        run.step(step)
    prepared = [
        Batch(
            torch.randint(0, 256, (ROWS, 3, 112, 112), dtype=torch.uint8, device="cuda"),
            torch.randint(0, CLASSES, (ROWS,), device="cuda"),
            torch.arange(ROWS, device="cuda"),
        )
        for _ in range(9)
    ]
    torch.cuda.synchronize()
    said = []
    for step, batch in enumerate(prepared):
        run.bad = step == 2
        torch.cuda.set_sync_debug_mode("error")
        try:
            values = run.train_step([batch], step=step, lr=0.05)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        guard.take(step, 0.05, values)
        said.append(len(lines))
    assert said == [0] * 6 + [1] * 3
    assert lines[0].startswith("step 3: skipped, the loss is not finite")
    assert guard.skipped_steps == 1


def test_what_is_under_way_is_settled_before_state_is_saved(gpu: Ranks) -> None:
    run = Run(gpu)
    guard = Guard(
        GuardConfig(), parameters=[name for name, _ in run.net.named_parameters()], ranks=gpu, say=lambda _: None
    )
    guard.take(0, 0.05, run.step(0, bad=True))
    assert guard.skipped_steps == 0
    guard.settle()
    assert guard.state_dict()["skipped_steps"] == 1
