"""Collectives and memory of the planner against a rank of a large world, up to 1,024 ranks and 1e9 identities.

torch's fake process group stands for the other ranks: its collectives move nothing, and every one is counted where it
is called. Sizes are real, but for D, so that a rank's shard fits.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import IMAGE_SIZE, build_backbone
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, HeadConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from training import distributed
from training.distributed import Ranks, data_parallel
from training.optim import build_optimizers
from training.plan import state, traffic
from training.plan.state import Sizes, sizes_of
from training.step import TrainStep
from training.traffic import Collective

CPU = torch.device("cpu")
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}
"""Kind by the name of the operator, and which argument is the whole tensor."""


class Counting(TorchDispatchMode):
    """Calls and bytes of every collective, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = _KINDS[func.overloadpacket.__name__]
            self.bytes[kind] += sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def of_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for one in collectives:
        total[one.kind] += one.bytes
    return {kind: size for kind, size in total.items() if size}


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[Ranks]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield Ranks(rank=rank, world_size=world, device=CPU, group=group, store=FakeStore())
    finally:
        dist.destroy_process_group()


def _sum_of_fakes(group: Any, bucket: Any) -> Any:
    """A fake collective's future has no value; this one has."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def step_of(config: RunConfig, ranks: Ranks, classes: int) -> TrainStep:
    D = config.model.embedding_size
    head = PartialFCHead(num_classes=classes, embedding_size=D, config=config.head, group=ranks.group, seed=0)
    net = data_parallel(build_backbone(config.model.backbone, embedding_size=D), ranks)
    optimizers = build_optimizers(net.parameters(), head.parameters(), config.optim, config.head, seed=0)
    return TrainStep(backbone=net, head=head, service=None, optimizers=optimizers, config=config, device=CPU)


def batches(config: RunConfig, count: int) -> list[Batch]:
    B = config.train.batch_size
    pixels = torch.zeros(B, 3, *IMAGE_SIZE, dtype=torch.uint8)
    return [Batch(pixels, torch.arange(B), torch.arange(B)) for _ in range(count)]


CASES = [
    # world, rank, classes, D, head, accumulation
    (1024, 3, 1_000_000_000, 4, HeadConfig(sample_rate=1e-4), 1),
    (1024, 1023, 1_000_003, 8, HeadConfig(sample_rate=0.1, wire_dtype="bf16", centre_dtype="bf16"), 2),
    (96, 95, 29_000_001, 4, HeadConfig(sample_rate=1e-3, loss="curricularface"), 1),
    (7, 2, 10_007, 16, HeadConfig(subcentres=3, missed_steps="catch_up", sample_rate=0.5), 2),
    (64, 63, 33, 16, HeadConfig(), 1),  # ranks without classes
]


@pytest.mark.parametrize(("world", "rank", "classes", "dim", "head", "accumulation"), CASES)
def test_a_step_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, world: int, rank: int, classes: int, dim: int, head: HeadConfig, accumulation: int
) -> None:
    """Bytes of all collectives, and of centres and moments, to the last one."""
    monkeypatch.setattr(distributed, "_sum_gradients", _sum_of_fakes)
    config = RunConfig(
        model=ModelConfig(backbone="small", embedding_size=dim),
        head=head,
        clustering=ClusteringConfig(enabled=False),
        train=TrainConfig(batch_size=2, accumulation=accumulation, precision="fp32"),
        optim=OptimConfig(name="adamw" if head.centre_dtype == "bf16" else "sgd"),
    )
    sizes = state.even_sizes(classes, classes, world)
    with fake_world(rank, world) as ranks:
        step = step_of(config, ranks, classes)
        step(batches(config, accumulation), step=0, lr=0.1)  # DDP tells the order of its buckets once more
        with Counting() as counted:
            step(batches(config, accumulation), step=1, lr=0.1)
    wanted = [one for one in traffic.of_step(config, sizes) if one.what not in traffic.UNWAITED]  # which are the loop's
    assert of_kind(wanted) == {kind: size for kind, size in counted.bytes.items() if size}
    assert sum(one.times for one in wanted) == sum(counted.calls.values())

    weight = step.head.weight
    moments = sum(t.nbytes for t in step.optimizers[1].state[weight].values() if isinstance(t, Tensor))
    largest = replace(sizes, own_classes=len(weight) // head.subcentres)
    assert state.centre_bytes(config, largest.own_classes) == (
        weight.nbytes,
        moments + 4 * len(weight) * (head.missed_steps == "catch_up"),
    )
    assert 0 <= sizes.own_classes - largest.own_classes <= 1


def _labels(classes: int, samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.int64) % classes


@pytest.mark.parametrize(
    ("world", "rank", "classes", "extra", "negatives", "gate"),
    [(64, 0, 1000, 0.15, 0, True), (48, 47, 1031, 0.0, 3, True), (7, 0, 500, 0.5, 0, False)],
)
def test_a_refresh_of_the_clusters(
    world: int, rank: int, classes: int, extra: float, negatives: int, gate: bool
) -> None:
    """From the bank to the first version, and the losses that it brings."""
    D, B, samples = 8, 2, 4 * classes
    clustering = ClusteringConfig(
        extra_clusters=extra,
        hard_negatives=negatives,
        noise_gate=gate,
        iterations=2,
        warmup_fraction=0,
        ramp_fraction=0,
    )
    config = RunConfig(
        model=ModelConfig(backbone="small", embedding_size=D),
        head=HeadConfig(sample_rate=0.5),
        clustering=clustering,
        train=TrainConfig(batch_size=B, precision="fp32"),
    )
    labels = _labels(classes, samples)
    sizes = sizes_of(labels, classes, world)
    with fake_world(rank, world) as ranks:
        service = ClusterService(
            labels=labels, num_classes=classes, dim=D, group=ranks.group, device=CPU, config=clustering, margin=0.5,
            total_steps=1000, steps_per_epoch=10,
        )  # fmt: skip
        _fill_apart(service, classes)
        with Counting() as counted:
            service.advance(9)
            assert service._refresh is not None
            service._refresh.run._shown_XD.zero_()  # what a fake broadcast leaves as it finds it
            for step in range(10, 400):
                service.advance(step)
                if service.version:
                    break
        assert not service.failed_refreshes
        assert service.version == 1
        with Counting() as losses:
            x_BD = torch.nn.functional.normalize(torch.randn(B, D)).requires_grad_()
            batch = gather_batch(
                x_BD, torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64), ranks.group
            )
            weight = torch.randn(service.classes.size, D, requires_grad=True)
            (service.contrastive(batch) + service.alignment(batch, weight)).backward()
    # This rank alone has samples, and its classes' clusters: these are full, and all others stay empty.
    K = clustering.num_clusters(classes)
    wanted = traffic.of_refresh(config, sizes, rounds=1, empty=K - service.classes.size)
    assert of_kind(wanted) == {kind: size for kind, size in counted.bytes.items() if size}
    assert sum(one.times for one in wanted) == sum(counted.calls.values())
    names = {"embeddings, lengths, labels, ids", "gradients of embeddings and lengths", *traffic.OF_CLUSTER_LOSSES}
    in_losses = [one for one in traffic.of_step(config, sizes) if one.what in names]
    assert of_kind(in_losses) == dict(losses.bytes)


def _fill_apart(service: ClusterService, classes: int) -> None:
    """Every class of this rank in a place of its own, so that a single round matches them."""
    points = service.bank.points()
    generator = torch.Generator().manual_seed(1)
    apart_CD = torch.nn.functional.normalize(torch.randn(classes, points.x_PD.shape[1], generator=generator))
    points.x_PD.copy_(apart_CD[points.class_P])
    points.seen_P.fill_(True)


def test_a_service_holds_what_is_planned() -> None:
    """Bank and version, tensor by tensor, of a rank of a world that does not divide the classes."""
    classes, world = 1031, 48
    config = RunConfig(
        model=ModelConfig(backbone="small", embedding_size=8),
        head=HeadConfig(sample_rate=0.5),
        clustering=ClusteringConfig(hard_negatives=3, iterations=1),
    )
    labels = _labels(classes, 5 * classes)
    sizes = sizes_of(labels, classes, world)
    with fake_world(0, world) as ranks:
        service = ClusterService(
            labels=labels, num_classes=classes, dim=8, group=ranks.group, device=CPU, config=config.clustering,
            margin=0.5, total_steps=1000, steps_per_epoch=10,
        )  # fmt: skip
        _fill_apart(service, classes)
        bank = service.bank
        held = (bank._x, bank._seen, bank.class_P, bank.sample_P, bank._slot_of_sample)
        assert sum(t.nbytes for t in held) == state.bank_bytes(config, sizes)
        service.advance(9)
        refresh = service._refresh
        assert refresh is not None
        run, publication = refresh.run, refresh._publication
        assert refresh.points.x_PD.nbytes + refresh.points.seen_P.nbytes == state.snapshot_bytes(config, sizes)
        assert _held(run, {"points"}) + _held(run._order, set()) == state.kmeans_bytes(config, sizes)
        own = {"_run", "_bank", "_previous", "_config", "_group", "_guard"}
        found = _held(publication, own) + _held(publication._cohesion, {"_x_PD"}) + _held(publication._nearest, set())
        assert found == state.publication_bytes(config, sizes)
        for step in range(10, 400):
            service.advance(step)
            if service.version:
                break
        published = service._published
        assert published is not None
        kept = [t for t in published.state_dict().values() if isinstance(t, Tensor)]
        assert sum(t.nbytes for t in kept) == pytest.approx(state.version_bytes(config, sizes), abs=64)


def _held(thing: Any, but: set[str]) -> int:
    """Bytes of an object's own tensors."""
    return sum(t.nbytes for name, t in vars(thing).items() if isinstance(t, Tensor) and name not in but)


def test_counting_counts() -> None:
    """A collective that nobody planned does not pass."""
    with fake_world(0, 8) as ranks, Counting() as counted:
        dist.all_reduce(torch.zeros(10), group=ranks.group)
        dist.broadcast(torch.zeros(3, dtype=torch.float64), group=ranks.group, group_src=0)
    assert counted.bytes == {"all_reduce": 40, "broadcast": 24}
    assert Sizes(classes=1, samples=1, ranks=1, own_classes=1, own_samples=1).host_ranks == 0
