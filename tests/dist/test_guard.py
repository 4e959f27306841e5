"""A step that is not finite moves nothing, on any number of ranks, whatever makes it so on one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import Backbone
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, GuardConfig, HeadConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from tests.ranks import WORLD_SIZES, RankPool, ranks_of
from training.distributed import data_parallel
from training.guard import Guard, RollBack
from training.optim import build_optimizers
from training.step import StepValues, TrainStep

CPU = torch.device("cpu")
CLASSES, GLOBAL, SAMPLES = 13, 16, 48
LABELS = np.arange(SAMPLES) % CLASSES
HEADS: dict[str, dict[str, Any]] = {
    "arcface": {},
    "adaface, sampled": {"loss": "adaface", "margin": 0.4, "sample_rate": 0.3},
    "curricularface": {"loss": "curricularface"},
    "catching up": {"sample_rate": 0.3, "missed_steps": "catch_up"},
}


class Toy(Backbone):
    """With BatchNorm, and a place at which an image of ones turns into nan."""

    def __init__(self) -> None:
        super().__init__(embedding_size=6)
        self.convolution = nn.Conv2d(3, 4, 16, stride=16)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 49, 6)
        self.factor = 1.0

    def body(self, images_B3HW: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.convolution(images_B3HW * self.factor)))

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.linear(features_BCHW.flatten(1))


class Run:
    """A rank's part of a small training."""

    def __init__(self, group: dist.ProcessGroup, *, clusters: bool = False, precision: str = "fp32", **settings: Any):
        self.ranks = ranks_of(group)
        optim = OptimConfig(name=settings.pop("optim", "sgd"), lr=0.05, reference_batch=0)
        config = RunConfig(
            head=HeadConfig(**{"scale": 16.0, "margin": 0.3, **settings}),
            clustering=ClusteringConfig(enabled=clusters, margin_low=0.1, margin_high=0.5, warmup_fraction=0.0),
            optim=optim,
            train=TrainConfig(precision=precision),  # type: ignore[arg-type]
        )
        torch.manual_seed(5)
        self.toy = Toy()
        self.backbone = data_parallel(self.toy, self.ranks)
        self.head = PartialFCHead(num_classes=CLASSES, embedding_size=6, config=config.head, group=group, seed=1)
        self.service: ClusterService | None = None
        if clusters:
            self.service = ClusterService(
                labels=LABELS, num_classes=CLASSES, dim=6, group=group, device=CPU, config=config.clustering,
                margin=0.3, total_steps=100, steps_per_epoch=10, bank_dtype=torch.float32,
            )  # fmt: skip
        self.optimizers = build_optimizers(
            self.backbone.parameters(), self.head.parameters(), config.optim, config.head, seed=0
        )
        self.train_step = TrainStep(
            backbone=self.backbone,
            head=self.head,
            service=self.service,
            optimizers=self.optimizers,
            config=config,
            device=CPU,
        )

    def step(self, step: int, *, micro_batches: int = 1) -> StepValues:
        size = GLOBAL // self.ranks.world_size // micro_batches
        batches = []
        for micro in range(micro_batches):
            first = (micro * self.ranks.world_size + self.ranks.rank) * size
            ids = torch.arange(first, first + size) + step * GLOBAL
            ids %= SAMPLES
            pictures = [
                torch.randint(0, 256, (3, 112, 112), generator=torch.Generator().manual_seed(int(i)), dtype=torch.uint8)
                for i in ids
            ]
            batches.append(Batch(torch.stack(pictures), torch.from_numpy(LABELS)[ids], ids))
        return self.train_step(batches, step=step, lr=0.05)

    def bits(self) -> dict[str, Any]:
        """All that a step may change."""
        states: dict[str, Any] = {}
        for number, optimizer in enumerate(self.optimizers):
            for name, state in optimizer.state_dict()["state"].items():
                states |= {f"{number}.{name}.{key}": value for key, value in state.items() if key != "steps"}
        head = {f"head.{name}": value for name, value in self.head.state_dict().items() if isinstance(value, Tensor)}
        return copy.deepcopy({**states, **self.toy.state_dict(), **head})


def _same(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(torch.as_tensor(value), second[name])]


def _in_images(run: Run) -> Callable[[], None]:
    run.toy.factor = torch.nan
    return lambda: setattr(run.toy, "factor", 1.0)


def _in_a_gradient(run: Run) -> Callable[[], None]:
    """Before DDP sums it: hooks of a tensor come before the one that puts the gradient into its bucket."""
    return run.toy.linear.bias.register_hook(lambda gradient: gradient * torch.inf).remove


PLANTS = {"images": _in_images, "gradient": _in_a_gradient}


def _skipped(group: dist.ProcessGroup, plant: str, head: str, optim: str, micro_batches: int) -> dict[str, Any]:
    run = Run(group, optim=optim, **HEADS[head])
    lines: list[str] = []
    names = [name for name, _ in run.toy.named_parameters()]
    guard = Guard(GuardConfig(skips_to_roll_back=3), parameters=names, ranks=run.ranks, say=lines.append)
    for step in range(3):
        guard.take(step, 0.05, run.step(step, micro_batches=micro_batches))
    before = run.bits()
    mend = PLANTS[plant](run) if run.ranks.rank == run.ranks.world_size - 1 else lambda: None
    values = run.step(3, micro_batches=micro_batches)
    guard.take(3, 0.05, values)
    found = _same(before, run.bits())
    mend()
    again = run.step(4, micro_batches=micro_batches)
    guard.take(4, 0.05, again)
    return {
        "changed": found,
        "skipped": values.skipped.item(),
        "again": again.skipped.item(),
        "moved": _same(before, run.bits()),
        "lines": lines,
        "norms": values.norms_P.isfinite().tolist(),
        "state": guard.state_dict(),
        "weights": run.toy.state_dict()["linear.weight"],
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(
    ("head", "optim", "micro_batches"),
    [("arcface", "sgd", 1), ("adaface, sampled", "adamw", 2), ("curricularface", "sgd", 2), ("catching up", "sgd", 1)],
)
def test_one_ranks_fault_skips_the_step_on_all(
    ranks: RankPool, world_size: int, plant: str, head: str, optim: str, micro_batches: int
) -> None:
    parts = ranks.run(world_size, _skipped, plant, head, optim, micro_batches)
    for part in parts:
        assert part["changed"] == []
        assert part["skipped"] == 1
        assert part["again"] == 0
        assert "linear.weight" in part["moved"]
        assert "head.weight" in part["moved"]
        assert part["norms"] == parts[0]["norms"]
        assert part["state"] == parts[0]["state"]
        assert torch.equal(part["weights"], parts[0]["weights"])
        assert part["weights"].isfinite().all()
        assert part["state"]["skipped_steps"] == 1
    (line,) = parts[0]["lines"]
    assert line.startswith("step 4: skipped, ")
    assert all(part["lines"] == [] for part in parts[1:])
    if plant == "gradient":
        assert "the gradient of linear.bias is not, the first in backward (learning rate 0.05)" in line
        assert line.count(";") == world_size, "samples of each rank"
    else:
        first = GLOBAL - GLOBAL // world_size // micro_batches  # the last rank's rows of the last micro-batch
        assert "the loss is not finite" in line
        assert f"of samples {first * (micro_batches == 1) + (3 * GLOBAL % SAMPLES) or ''}" in line


def _centre_that_is_lost(group: dist.ProcessGroup) -> tuple[str, int]:
    run = Run(group)
    guard = Guard(GuardConfig(skips_to_roll_back=3), parameters=[], ranks=run.ranks, say=lambda _: None)
    run.step(0)
    if run.ranks.rank == 0:
        with torch.no_grad():
            run.head.weight[1, 2] = torch.nan
    for step in range(1, 10):
        try:
            guard.take(step, 0.05, run.step(step))
        except RollBack as failure:
            return str(failure), step
    return "", -1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_centre_that_is_not_finite_ends_in_a_rollback_on_all_ranks(ranks: RankPool, world_size: int) -> None:
    found = ranks.run(world_size, _centre_that_is_lost)
    assert found == [("3 steps in a row, up to step 4, were not finite", 3)] * world_size


def _bank(group: dist.ProcessGroup) -> tuple[bool, bool]:
    """Whether the bank's rows are finite after a step of which one rank's rows were not, and whether some are new."""
    run = Run(group, clusters=True)
    assert run.service is not None
    run.step(0)
    before = copy.deepcopy(run.service.bank.state_dict())
    if run.ranks.rank == 0:
        run.toy.factor = torch.nan
    run.step(1)
    after = run.service.bank.state_dict()
    tensors = [name for name, value in after.items() if isinstance(value, Tensor)]
    finite = all(bool(after[name].isfinite().all()) for name in tensors if after[name].is_floating_point())
    return finite, any(not torch.equal(before[name], after[name]) for name in tensors)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_cluster_service_takes_in_only_rows_that_are_finite(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _bank)
    assert all(finite for finite, _ in parts)
    assert any(new for _, new in parts) == (world_size > 1)


def _resumed(group: dist.ProcessGroup) -> list[str]:
    """What differs at the end between a run and one that was saved, and loaded by another, after a skipped step."""
    ends = []
    for parted in (False, True):
        run = Run(group, optim="adamw", sample_rate=0.5, centre_dtype="bf16")
        for step in range(6):
            mend = _in_a_gradient(run) if step == 2 and run.ranks.rank == 0 else lambda: None
            assert run.step(step).skipped.item() == (step == 2)
            mend()
            if parted and step == 2:
                states = [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers]
                modules = [copy.deepcopy(module.state_dict()) for module in (run.toy, run.head)]
                run = Run(group, optim="adamw", sample_rate=0.5, centre_dtype="bf16")
                for optimizer, state in zip(run.optimizers, states, strict=True):
                    optimizer.load_state_dict(state)
                for module, state in zip((run.toy, run.head), modules, strict=True):
                    module.load_state_dict(state)
        ends.append(run.bits())
    return _same(*ends)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_that_is_resumed_after_a_skipped_step_ends_as_one_that_was_not(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _resumed) == [[]] * world_size


def _half(group: dist.ProcessGroup) -> dict[str, Any]:
    run = Run(group, precision="fp16")
    scale = run.train_step.loss_scale
    assert scale is not None
    scale.factor.fill_(2.0**40)  # which half precision cannot hold
    before = run.bits()
    values = run.step(0)
    changed = _same(before, {name: value for name, value in run.bits().items() if name in before})
    factors = [scale.factor.item()]
    while run.step(1).skipped.item():
        factors.append(scale.factor.item())
    full = Run(group)
    full.step(1)
    half_P, full_P = (
        torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None]) for toy in (run.toy, full.toy)
    )
    return {
        "changed": changed,
        "skipped": values.skipped.item(),
        "fault": values.fault.item(),
        "factors": factors,
        "off": float((half_P - full_P).norm() / full_P.norm()),
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_half_precision_finds_its_scale_and_has_the_gradients_of_full(ranks: RankPool, world_size: int) -> None:
    for part in ranks.run(world_size, _half):
        assert part["skipped"] == 1
        assert part["fault"] == 0
        assert part["changed"] == []
        assert part["factors"] == [2.0 ** (39 - n) for n in range(len(part["factors"]))]
        assert part["off"] < 0.05
