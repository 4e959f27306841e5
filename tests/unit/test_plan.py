"""The capacity planner's counts against tensors that are really made: weights, activations, optimizers, peaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore

from backbones import IMAGE_SIZE, build_backbone, normalise_pixels
from clustering.service.bank import Points
from clustering.service.dist_kmeans import KMeansRun
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, HeadConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from partial_fc.head import PartialFCHead
from partial_fc.sampling import sample_rows
from sharding import shard_of
from training.optim import build_optimizers
from training.plan import counting, memory, state, work
from training.plan.counting import Live, backbone_pass
from training.plan.devices import device_of
from training.plan.memory import memory_of
from training.plan.state import even_sizes, sizes_of
from training.showing.flops import forward_flops

CPU = device_of("cpu")


def _config(head: HeadConfig | None = None, *, dim: int = 32, batch: int = 16, **sections: object) -> RunConfig:
    plain = {
        "model": ModelConfig(backbone="small", embedding_size=dim),
        "head": head or HeadConfig(),
        "clustering": ClusteringConfig(enabled=False),
        "train": TrainConfig(batch_size=batch, precision="fp32"),
    }
    return RunConfig(**{**plain, **sections})  # type: ignore[arg-type]


# ---- the backbone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(name="adamw"), OptimConfig(momentum=0)])
def test_weights_gradients_and_moments(optim: OptimConfig) -> None:
    config = _config(optim=optim)
    net = build_backbone("small", embedding_size=32)
    centres = torch.nn.Parameter(torch.randn(4, 32))
    optimizer, _ = build_optimizers(net.parameters(), [centres], optim, config.head, seed=0)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(
        t.nbytes for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor) and t.numel() > 1
    )
    rows = {row.name: row.bytes for row in memory_of(config, even_sizes(100, 100, 1), CPU).rows}
    weights = sum(p.nbytes for p in net.parameters())
    assert rows["backbone: weights and statistics"] == weights + sum(b.nbytes for b in net.buffers())
    assert rows["backbone: gradients, in DDP's buckets"] == weights
    # PReLU's slopes of one number are told apart from AdamW's count of steps by hand.
    assert rows.get("backbone: optimizer", 0) == pytest.approx(moments, abs=64)
    once = backbone_pass("small", embedding_size=32, recompute=0.0, batch=16, precision="fp32")
    assert (rows["backbone: activations kept"], rows["backbone: at a time"]) == (once.kept, once.peak - once.kept)
    assert once.peak > once.kept
    assert rows["backbone: optimizer at a time"] == max(p.nbytes for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "batch", "recompute", "precision"),
    [
        ("small", 5, 0.0, "fp32"),
        ("small", 3, 1.0, "fp32"),
        ("small", 4, 0.0, "bf16"),
        ("mobilefacenet", 2, 0.5, "fp32"),
    ],
)
def test_activations_are_those_that_autograd_saves(name: str, batch: int, recompute: float, precision: str) -> None:
    """A real pass, with real memory: what is saved, and the highest point."""
    net = build_backbone(name, embedding_size=24, recompute=recompute).train()
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randint(0, 256, (batch, *IMAGE_SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with Live() as live:
        with (
            saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            embedding = net(normalise_pixels(images))
        kept = sum(saved.values())
        embedding.backward(torch.ones_like(embedding))
    planned = backbone_pass(name, embedding_size=24, recompute=recompute, batch=batch, precision=precision)
    assert planned.kept == pytest.approx(kept, rel=0.002 if precision == "bf16" else 0)  # CPUs keep some means in fp32
    assert planned.peak == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("name", ["small", "vit_t"])
def test_arithmetic_is_three_times_that_of_forward(name: str) -> None:
    """But for the first layer, whose images need no gradient; attention computes its products again in backward."""
    batch = 4
    counted = backbone_pass(name, embedding_size=24, recompute=0.0, batch=batch, precision="fp32")
    forward = batch * forward_flops(build_backbone(name, embedding_size=24).train())
    assert counted.convolutions + counted.products == pytest.approx(3 * forward, rel=0.08)
    assert (counted.products > counted.convolutions) == (name == "vit_t")


def test_attention_is_counted() -> None:
    """Two products of (T, d) and (T, T) a head forward; five back, as the cosines are made once more."""
    query, key, value = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    with counting.Tally() as tally:
        out = F.scaled_dot_product_attention(query, key, value)
        assert tally.products == 2 * 2 * (2 * 3) * 16 * 16 * 8
        out.backward(torch.ones_like(out))
    assert tally.products == 7 * 2 * (2 * 3) * 16 * 16 * 8


def test_more_images_take_more_and_weights_once() -> None:
    one, two, four = (
        backbone_pass("small", embedding_size=24, recompute=0.0, batch=batch, precision="bf16") for batch in (2, 4, 8)
    )
    assert four.kept - two.kept == 2 * (two.kept - one.kept)
    weights = 2 * counting.backbone_sizes("small", embedding_size=24).parameters
    assert 0.5 * weights < 2 * one.kept - two.kept <= weights  # those that autocast rounds, kept for backward


# ---- the head ------------------------------------------------------------------------------------------------------


HEADS = [
    (HeadConfig(), False),
    (HeadConfig(), True),
    (HeadConfig(sample_rate=0.25), False),
    (HeadConfig(sample_rate=0.25), True),
    (HeadConfig(centre_dtype="bf16"), False),
    (HeadConfig(subcentres=2), False),
]


@pytest.mark.parametrize(("head", "adam"), HEADS)
def test_a_step_of_the_head_takes_what_is_planned(head: HeadConfig, adam: bool) -> None:
    """The highest point of loss, backward and update over all that is there all the time, from real tensors."""
    classes, D, N = 36_000, 128, 128
    config = _config(head, dim=D, batch=N, optim=OptimConfig(name="adamw" if adam else "sgd"))
    module = PartialFCHead(num_classes=classes, embedding_size=D, config=head, group=None, seed=0)
    nothing = [torch.nn.Parameter(torch.zeros(1))]
    _, optimizer = build_optimizers(nothing, [module.weight], config.optim, head, seed=0)
    x_ND = torch.randn(N, D)
    labels_N = torch.arange(N)

    def step(number: int) -> None:
        leaf_ND = x_ND.clone().requires_grad_()
        module(module.gather(leaf_ND, labels_N, labels_N), step=number).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    with Live() as live:
        step(1)
    sizes = even_sizes(classes, classes, 1)
    names = ("head", "gathered", "targets", "drawing")
    rows = [row for row in memory_of(config, sizes, CPU).rows if row.name.startswith(names)]
    planned = max(sum(row.bytes for row in rows if moment in row.when) for moment in ("head", "update"))
    assert planned == pytest.approx(live.peak, rel=0.2)


@pytest.mark.parametrize(("rate", "ranks"), [(1.0, 4), (0.1, 4), (0.1, 1)])
def test_work_of_the_head_is_four_products_less_what_is_kept(rate: float, ranks: int) -> None:
    config = _config(HeadConfig(sample_rate=rate))
    sizes = even_sizes(1003, 1003, ranks)
    forward, update = work.of_head(config, sizes, CPU)
    N = 16 * ranks
    taking = memory.taking_part(config, sizes, N)
    assert forward["head"] == 2 * update["head"] == 4 * N * 32 * taking
    assert taking == (251 if rate == 1 else {4: 25 + 64, 1: 100 + 16}[ranks])
    forward, update = work.of_head(config, replace(sizes, own_classes=100_000_000), CPU)
    assert 0.75 * forward["head"] < update["head"] < forward["head"]  # few of so many cosines are kept


@pytest.mark.parametrize(("ranks", "rate"), [(1, 0.1), (7, 0.1), (64, 0.01), (3, 0.9)])
def test_classes_that_take_part_are_those_of_the_sampling(ranks: int, rate: float) -> None:
    classes, N = 1_000_003, 16 * ranks
    planned = memory.taking_part(_config(HeadConfig(sample_rate=rate)), even_sizes(classes, classes, ranks), N)
    drawn = sample_rows(torch.arange(N), shard_of(0, ranks, classes), classes, rate, seed=0, step=1)
    assert planned == pytest.approx(len(drawn.rows_S), abs=1024 * rate + 1)  # a block may belong to two ranks


# ---- the cluster service -------------------------------------------------------------------------------------------


@contextmanager
def _one_rank() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_a_refresh_takes_what_is_planned() -> None:
    """The highest point of a second refresh, beside the version that the first made."""
    classes, D = 1500, 64
    labels = np.arange(6 * classes, dtype=np.int64) % classes
    config = _config(dim=D, clustering=ClusteringConfig(iterations=1, extra_clusters=0.1))
    sizes = sizes_of(labels, classes, 1)
    with _one_rank() as group:
        with Live() as live:
            service = ClusterService(
                labels=labels, num_classes=classes, dim=D, group=group, device=torch.device("cpu"),
                config=config.clustering, margin=0.5, total_steps=1000, steps_per_epoch=10,
            )  # fmt: skip
        points = service.bank.points()
        person_CD = torch.randn(classes, D)
        points.x_PD.copy_(F.normalize(person_CD[points.class_P] + 0.5 * torch.randn(len(labels), D)))  # all are counted
        points.seen_P.fill_(True)
        with live:
            step = 9
            while service.version < 2:
                if service.version == 0:
                    live.peak = live.now
                service.advance(step)
                step += 1
                if service._refresh is None and service.version == 1:
                    held = state.bank_bytes(config, sizes) + state.version_bytes(config, sizes)
                    assert live.now < 1.05 * held, "a refresh stays when it is over"
    rows = [
        row for row in memory_of(config, sizes, CPU).rows if row.name.startswith(("embedding", "clusters", "refresh"))
    ]
    assert sum(row.bytes for row in rows) == pytest.approx(live.peak, rel=0.15)


def test_ranks_split_all_but_what_every_rank_holds() -> None:
    labels = np.arange(8000, dtype=np.int64) % 1000
    config = _config(clustering=ClusteringConfig())
    one, eight = (sizes_of(labels, 1000, ranks) for ranks in (1, 8))
    assert state.snapshot_bytes(config, one) == 8 * state.snapshot_bytes(config, eight)
    assert even_sizes(1000, 8000, 8) == eight
    K = 1150
    everywhere = 4 * 8000 + 20 * K
    assert state.version_bytes(config, one) - everywhere == pytest.approx(
        8 * (state.version_bytes(config, eight) - everywhere), rel=0.01
    )
    huge = even_sizes(1_000_000_000, 2_000_000_000, 1024)
    rows = {row.name: row.bytes for row in memory_of(config, huge, device_of("H100")).rows}
    assert rows["refresh: a slice, hard levels"] >= 160 * 1_000_000_000  # numbers of all classes, on every rank


@pytest.mark.parametrize(
    ("samples", "classes", "clusters"), [(40_000, 9000, 30_000), (3000, 3000, 600_000), (90, 30, 40)]
)
def test_a_seeding_takes_what_is_planned(samples: int, classes: int, clusters: int) -> None:
    """Every cluster is empty, and every class has a candidate."""
    class_P = torch.arange(samples).mul_(classes).floor_divide_(samples)
    seen_P = torch.ones(samples, dtype=torch.bool)
    points = Points(x_PD=torch.zeros(samples, 2), class_P=class_P, sample_P=class_P, seen_P=seen_P, largest=samples)
    with _one_rank() as group:
        run = KMeansRun(
            points=points, centres_SD=None, num_clusters=clusters, iterations=1, block=100, gate=None, group=group
        )
        run.best_P.zero_()
        with Live() as live:
            run._seed()
    assert len(run.seed_point_Q) == min(classes, clusters - len(class_P.unique()))
    assert memory._seeding(samples, classes, clusters) == pytest.approx(live.peak, rel=0.1)
