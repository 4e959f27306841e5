"""`model.graph` with a stand-in for CUDA's graphs: what recording leaves as it was, and who runs what was recorded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbones import Backbone, build_backbone
from backbones.recorded import Recorded
from configs.schema import ClusteringConfig, ConfigError, ModelConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from training.building import new_backbone, on_all_ranks
from training.distributed import Ranks, data_parallel
from training.optim import build_optimizers
from training.plan.devices import device_of
from training.plan.memory import memory_of
from training.plan.state import even_sizes
from training.step import TrainStep


class Graphs:
    """torch.cuda.make_graphed_callables as far as a CPU can be it: static inputs, outputs and gradients."""

    def __init__(self) -> None:
        self.passes, self.replays = 0, 0
        self.cached: bool | None = None

    def __call__(self, function: Callable[..., Tensor], sample: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self.cached = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        wanted = [value for value in sample if value.requires_grad]
        for _ in range(4):  # three to warm up, one to record
            out = function(*sample)
            torch.autograd.grad(out, wanted, torch.full_like(out, 1e4))
            self.passes += 1
        graphs, static_out, static = self, out.detach().clone(), [torch.empty_like(value) for value in wanted]
        recorded: list[Tensor] = []

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                for mine, given in zip(sample, inputs, strict=True):
                    if mine.data_ptr() != given.data_ptr():
                        mine.copy_(given)
                graphs.replays += 1
                again = patch.object(Recorded, "takes", return_value=False)  # a replay runs no Python
                with again, torch.enable_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    recorded[:] = [function(*sample)]
                return static_out.copy_(recorded[0].detach()).detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                for mine, new in zip(static, torch.autograd.grad(recorded.pop(), wanted, gradient), strict=True):
                    mine.copy_(new)
                found = iter(static)
                return tuple(next(found).detach() if value.requires_grad else None for value in sample)

        return Graphed.apply


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
    return made


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    cpu = torch.device("cpu")
    yield Ranks(rank=0, world_size=1, device=cpu, group=dist.group.WORLD, store=store)  # type: ignore[arg-type]
    dist.destroy_process_group()


def _images(count: int, seed: int = 1) -> Tensor:
    images_BHW3 = torch.rand(count, 112, 112, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return images_BHW3.permute(0, 3, 1, 2)


def _build(name: str = "small") -> Backbone:
    torch.manual_seed(3)
    return build_backbone(name, embedding_size=8)


def _state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["small", "vit_t"])
def test_recording_leaves_all_as_it_was(graphs: Graphs, name: str) -> None:
    """vit_t draws random numbers, and has a weight that is not trained in some of its variants."""
    backbone = _build(name)
    before, places = _state(backbone), [buffer.data_ptr() for buffer in backbone.buffers()]
    random = torch.get_rng_state()
    backbone.record(_images(3))
    assert graphs.passes == 4
    assert _same(_state(backbone), before)
    assert [buffer.data_ptr() for buffer in backbone.buffers()] == places
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in backbone.parameters())
    assert "forward" not in vars(backbone)


@pytest.mark.parametrize("name", ["small", "vit_t"])
def test_embedding_gradients_and_statistics_are_those_without(graphs: Graphs, name: str) -> None:
    recorded, plain = _build(name), _build(name)
    recorded.record(_images(3, seed=7))
    results = []
    for backbone in (recorded, plain):
        torch.manual_seed(5)
        embedding_BD = backbone(_images(3))
        embedding_BD.backward(torch.ones_like(embedding_BD).cumsum(1))
        gradients = {key: weight.grad for key, weight in backbone.named_parameters() if weight.grad is not None}
        results.append(
            {**_state(backbone), "embedding": embedding_BD.detach(), **{f"d {k}": v for k, v in gradients.items()}}
        )
    assert graphs.replays == 1
    assert _same(*results)


def test_weights_that_are_not_trained_get_no_gradient(graphs: Graphs) -> None:
    backbone = _build()
    still = next(backbone.parameters()).requires_grad_(False)
    backbone.record(_images(2))
    backbone(_images(2)).sum().backward()
    assert graphs.replays == 1
    assert still.grad is None
    assert all(weight.grad is not None for weight in backbone.parameters() if weight is not still)


def test_only_training_with_such_images_replays(graphs: Graphs) -> None:
    backbone, plain = _build(), _build()
    backbone.record(_images(3))
    with torch.no_grad():
        assert torch.equal(backbone(_images(3)), plain(_images(3)))
    backbone(_images(2)).sum().backward()
    backbone(_images(3).double().float().contiguous())  # any layout
    assert graphs.replays == 1
    plain.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone.eval()(_images(3)), plain.eval()(_images(3)))
    assert graphs.replays == 1


def test_what_is_loaded_or_learnt_is_what_the_next_replay_runs(graphs: Graphs) -> None:
    backbone = _build()
    backbone.record(_images(3))
    torch.manual_seed(11)
    other = build_backbone("small", embedding_size=8)
    backbone.load_state_dict(other.state_dict())
    assert torch.equal(backbone(_images(3)), other(_images(3)))
    with torch.no_grad():
        for one, two in zip(backbone.parameters(), other.parameters(), strict=True):
            one.mul_(1.5), two.mul_(1.5)
    assert torch.equal(backbone(_images(3)), other(_images(3)))
    assert graphs.replays == 2


@pytest.mark.parametrize("made_by", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_runs_its_own_weights(graphs: Graphs, made_by: Callable[[Backbone], Backbone]) -> None:
    first = _build()
    first.record(_images(2))
    second = made_by(first)
    with torch.no_grad():
        for weight in first.parameters():
            weight.zero_()
    assert second(_images(2)).abs().sum() > 0
    assert graphs.replays == 0


def _train_step(ranks: Ranks, precision: Any) -> TrainStep:
    """Of the real step, as a trainer builds it."""
    config = RunConfig(
        model=ModelConfig(graph=True),
        clustering=ClusteringConfig(enabled=False),
        train=TrainConfig(precision=precision, batch_size=4),
    )
    backbone = data_parallel(_build(), ranks)
    head = PartialFCHead(num_classes=20, embedding_size=8, config=config.head, group=ranks.group, seed=0)
    optimizers = build_optimizers(backbone.parameters(), head.parameters(), config.optim, config.head, seed=0)
    return TrainStep(
        backbone=backbone, head=head, service=None, optimizers=optimizers, config=config, device=ranks.device
    )


def _batch(step: int) -> Batch:
    images_B3HW = ((_images(4, seed=step) + 1) * 127).to(torch.uint8)
    return Batch(images_B3HW, torch.arange(4) + step, torch.arange(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_replay_and_are_those_without(graphs: Graphs, one_rank: Ranks, precision: str) -> None:
    recorded, plain = _train_step(one_rank, precision), _train_step(one_rank, precision)
    places = [buffer.data_ptr() for buffer in recorded.backbone.module.buffers()]
    recorded.record(4)
    assert graphs.cached is False
    assert [buffer.data_ptr() for buffer in recorded.backbone.module.buffers()] == places
    for step in range(3):
        losses = [one([_batch(step)], step=step, lr=0.05).total for one in (recorded, plain)]
        assert torch.equal(*losses)
        assert _same(_state(recorded.backbone.module), _state(plain.backbone.module))
    assert graphs.replays == 3


def test_a_step_that_is_not_finite_moves_nothing(graphs: Graphs, one_rank: Ranks) -> None:
    step = _train_step(one_rank, "fp32")
    step.record(4)
    step([_batch(0)], step=0, lr=0.05)
    before = _state(step.backbone.module)
    bad = step.backbone.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan,))
    assert step([_batch(1)], step=1, lr=0.05).skipped == 1
    assert _same(_state(step.backbone.module), before)
    bad.remove()
    assert step([_batch(1)], step=1, lr=0.05).skipped == 0
    assert graphs.replays == 3
    assert not _same(_state(step.backbone.module), before)


def test_a_backbone_that_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch, one_rank: Ranks) -> None:
    def broken(_function: object, _sample: object) -> object:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        finally:
            raise RuntimeError("the end of it failed as well")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    said = (
        r"model\.graph: expected a backbone .*, got operation not permitted when stream is capturing: set it to false"
    )
    with pytest.raises(ConfigError, match=said) as caught:
        _train_step(one_rank, "fp32").record(4)
    assert "\n" not in str(caught.value)


def test_a_cpu_is_refused(one_rank: Ranks) -> None:
    model = ModelConfig(backbone="small", graph=True)
    with pytest.raises(ConfigError, match=r"model\.graph: expected a GPU, .*, got cpu: set it to false"):
        on_all_ranks(new_backbone(model), model, one_rank)
    plain = ModelConfig(backbone="small")
    assert isinstance(on_all_ranks(new_backbone(plain), plain, one_rank), DistributedDataParallel)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"compile": True}, r"model\.compile: expected false with model\.graph, got True"),
        ({"shard": "host"}, r"model\.shard: expected none with model\.graph, got 'host'"),
        ({"recompute": 0.5}, r"model\.recompute: expected 0 with model\.graph, got 0\.5"),
    ],
)
def test_settings_that_do_not_go_with_it(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelConfig(graph=True, **setting)
    ModelConfig(**setting)


def test_several_micro_batches_are_refused_where_they_are_known() -> None:
    graph = ModelConfig(graph=True)
    with pytest.raises(ConfigError, match=r"train\.accumulation: expected one .*, got 2 of 128 images: set it to 1"):
        RunConfig(model=graph, train=TrainConfig(accumulation=2))
    RunConfig(train=TrainConfig(accumulation=2))
    shared = RunConfig(model=graph, train=TrainConfig(global_batch=512, accumulation=9))  # which is then not read
    assert shared.share(4) == (128, 1)
    with pytest.raises(
        ConfigError, match=r"train\.global_batch: expected one .*, got 2 of 128 .* set model\.graph to f"
    ):
        shared.share(2)


def test_a_plan_counts_what_the_graphs_keep() -> None:
    rows = [
        {row.name: row for row in memory_of(config, even_sizes(100, 1000, 1), device_of("cpu")).rows}
        for config in (RunConfig(model=ModelConfig(backbone="small", graph=on)) for on in (False, True))
    ]
    (new,) = rows[1].keys() - rows[0].keys()
    weights = sum(weight.nbytes for weight in build_backbone("small").parameters())
    assert rows[1][new].bytes == weights + 128 * 3 * 112 * 112 * 4
    kept = "backbone: activations kept"
    assert rows[1][kept].bytes == rows[0][kept].bytes
    assert "update" in rows[1][kept].when
    assert "update" not in rows[0][kept].when
