"""The sharded head against the dense float64 head: loss and gradients, any ranks, classes and batches."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.schema import ConfigError, HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead, initial_centres
from partial_fc.reference import (
    TargetLogit,
    arcface_logit,
    combined_logit,
    cosface_logit,
    dense_margin_softmax,
    straight_through_logit,
)
from partial_fc.sampling import drawn_classes
from partial_fc.tiles import shift_for
from sharding import Shard, shard_of
from tests.ranks import WORLD_SIZES, RankPool

Case = dict[str, Any]


def _problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings near their centres (as in training), raw centres of uneven length, labels, margins; float64."""
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    rows, classes, dim = case["rows"], case["classes"], case["dim"]
    w_CD = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    w_CD *= torch.rand(classes, 1, generator=generator, dtype=torch.float64) + 0.1
    labels_N = torch.randint(0, case.get("labels_below", classes), (rows,), generator=generator)
    x_ND = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    x_ND = x_ND + case.get("pull", 2.0) * F.normalize(w_CD)[labels_N] * dim**0.5
    margins_C = 0.35 + 0.3 * torch.rand(classes, generator=generator, dtype=torch.float64)
    for row in case.get("ignored", ()):
        labels_N[row] = -1
    return x_ND, w_CD, labels_N, margins_C


def _dense(case: Case) -> tuple[float, Tensor, Tensor]:
    x_ND, w_CD, labels_N, margins_C = _problem(case)
    x_ND.requires_grad_(), w_CD.requires_grad_()
    loss = dense_margin_softmax(
        x_ND,
        w_CD,
        labels_N,
        margins_C,
        scale=case["scale"],
        target_logit=LOGITS[case.get("margin", "arcface")],
        interclass_filter=case.get("head", {}).get("interclass_filter", 0.0),
    )
    loss.backward()
    assert x_ND.grad is not None
    assert w_CD.grad is not None
    return loss.item(), x_ND.grad, w_CD.grad


def _sharded(group: dist.ProcessGroup, case: Case, need_x: bool, need_w: bool) -> tuple[float, Any, Any]:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    x_ND, w_CD, labels_N, margins_C = _problem(case)
    config = HeadConfig(scale=case["scale"], **case.get("head", {}))
    head = PartialFCHead(num_classes=case["classes"], embedding_size=case["dim"], config=config, group=group, seed=1)
    head.settings = dataclasses.replace(head.settings, chunk=case.get("chunk", 0))
    head.weight.data.copy_(w_CD[head.shard.start : head.shard.stop])
    head.weight.requires_grad_(need_w)
    mine = slice(rank * len(x_ND) // world_size, (rank + 1) * len(x_ND) // world_size)
    x_BD = x_ND[mine].float().requires_grad_(need_x)
    batch = gather_batch(F.normalize(x_BD), labels_N[mine], torch.arange(len(x_ND))[mine], group)
    loss = head(batch, step=0, class_margins_C=margins_C[head.shard.start : head.shard.stop].float())
    if need_x or need_w:
        loss.backward()
    return loss.item(), x_BD.grad, head.weight.grad


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


LOGITS: dict[str, TargetLogit] = {
    "arcface": arcface_logit,
    "cosface": cosface_logit,
    "straight through": straight_through_logit,
    "combined": partial(combined_logit, m1=1.2, m3=0.1),
}
_STRAIGHT = {"straight_through": True}
_COMBINED = {"loss": "combined", "m1": 1.2, "m3": 0.1}
_FILTER = {"interclass_filter": 0.2}
_SMALL: Case = {"rows": 8, "classes": 123, "dim": 12, "scale": 32.0}

CASES: dict[str, Case] = {
    "straight through": {**_SMALL, "margin": "straight through", "head": _STRAIGHT},
    "combined": {**_SMALL, "margin": "combined", "head": _COMBINED},
    "filter": {**_SMALL, "head": _FILTER, "chunk": 10},
    "filter, straight through": {**_SMALL, "margin": "straight through", "head": {**_STRAIGHT, **_FILTER}},
    "filter that needs a shift": {**_SMALL, "scale": 128.0, "pull": 0.0, "head": _FILTER},
    "odd classes": {"rows": 12, "classes": 123, "dim": 17, "scale": 64.0},
    "many tiles": {"rows": 8, "classes": 507, "dim": 32, "scale": 64.0, "chunk": 13},
    "cosface": {"rows": 8, "classes": 252, "dim": 24, "scale": 30.0, "margin": "cosface", "head": {"loss": "cosface"}},
    "one row a rank": {"rows": 4, "classes": 50, "dim": 8, "scale": 30.0},
    "fewer classes than ranks": {"rows": 8, "classes": 3, "dim": 8, "scale": 30.0},
    "ranks with no positive": {"rows": 8, "classes": 101, "dim": 16, "scale": 64.0, "labels_below": 5},
    "untrained": {"rows": 16, "classes": 211, "dim": 16, "scale": 64.0, "pull": 0.0},
    "against their class": {"rows": 16, "classes": 211, "dim": 16, "scale": 64.0, "pull": -3.0},
    "well learned": {"rows": 16, "classes": 97, "dim": 64, "scale": 64.0, "pull": 1.6},
    "rows without a label": {"rows": 12, "classes": 77, "dim": 16, "scale": 64.0, "ignored": (0, 3, 11)},
    "scale that needs a shift": {"rows": 8, "classes": 60, "dim": 16, "scale": 128.0},
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_head_in_float64(ranks: RankPool, name: str, world_size: int) -> None:
    case = CASES[name]
    loss, grad_x, grad_w = _dense(case)
    parts = ranks.run(world_size, _sharded, case, True, True)
    for part in parts:
        assert part[0] == pytest.approx(loss, rel=1e-5, abs=0)
    assert _relative(torch.cat([part[1] for part in parts]), grad_x) < 1e-5
    assert _relative(torch.cat([part[2] for part in parts]), grad_w) < 1e-5


def test_b_equals_one_on_one_rank(ranks: RankPool) -> None:
    case = {"rows": 1, "classes": 7, "dim": 5, "scale": 64.0}
    loss, grad_x, grad_w = _dense(case)
    ((found, found_x, found_w),) = ranks.run(1, _sharded, case, True, True)
    assert found == pytest.approx(loss, rel=1e-5, abs=0)
    assert _relative(found_x, grad_x) < 1e-5
    assert _relative(found_w, grad_w) < 1e-5


@pytest.mark.parametrize(("need_x", "need_w"), [(True, False), (False, True), (False, False)])
def test_every_combination_of_gradients(ranks: RankPool, need_x: bool, need_w: bool) -> None:
    case = CASES["odd classes"]
    loss, grad_x, grad_w = _dense(case)
    parts = ranks.run(2, _sharded, case, need_x, need_w)
    assert parts[0][0] == pytest.approx(loss, rel=1e-5, abs=0)
    if need_x:
        assert _relative(torch.cat([part[1] for part in parts]), grad_x) < 1e-5
    else:
        assert parts[0][1] is None
    if need_w:
        assert _relative(torch.cat([part[2] for part in parts]), grad_w) < 1e-5
    else:
        assert parts[0][2] is None


def test_all_rows_without_a_label_give_zero(ranks: RankPool) -> None:
    case = {"rows": 4, "classes": 9, "dim": 6, "scale": 64.0, "ignored": range(4)}
    for loss, grad_x, grad_w in ranks.run(2, _sharded, case, True, True):
        assert loss == 0
        assert (grad_x == 0).all()
        assert (grad_w == 0).all()


def test_no_sum_leaves_float32() -> None:
    for scale in (16.0, 64.0, 128.0, 512.0):
        for classes in (2, 10**5, 10**9):
            largest = torch.tensor(scale - shift_for(scale, classes)).exp() * classes
            assert torch.isfinite(largest)
    assert shift_for(64.0, 10**9) == 0


def _far_from_all(group: dist.ProcessGroup, scale: float, cosine: float) -> list[Tensor]:
    """Three centres at the same cosine to the embedding: loss, gradients."""
    w_CD = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])) * (1 - cosine**2) ** 0.5
    w_CD = torch.cat([torch.full((3, 1), cosine), w_CD], dim=1)
    x_BD = torch.tensor([[1.0, 0, 0, 0]], requires_grad=True)
    config = HeadConfig(scale=scale, margin=0.3)
    head = PartialFCHead(num_classes=3, embedding_size=4, config=config, group=group, seed=1)
    head.weight.data.copy_(w_CD)
    loss = head(gather_batch(x_BD, torch.tensor([1]), torch.tensor([0]), group), step=0)
    loss.backward()
    assert x_BD.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), x_BD.grad, head.weight.grad]


@pytest.mark.parametrize("cosine", [-0.2, -0.35, -0.36, -0.45, -0.9, -1.0])
def test_an_embedding_far_from_all_classes_leaves_no_nan(ranks: RankPool, cosine: float) -> None:
    """There exp() runs out of float32 at the lower end: gradients may vanish, but never turn into nan."""
    for scale in (64.0, 96.0, 128.0):
        for value in ranks.run(1, _far_from_all, scale, cosine)[0]:
            assert torch.isfinite(value).all()


def test_at_the_largest_scale_classes_within_100_degrees_stay_in_float32() -> None:
    scale = 128.0
    with pytest.raises(ConfigError, match=r"head\.scale"):
        HeadConfig(scale=math.nextafter(scale, math.inf))
    for classes in (2, 10**5, 10**9):
        term = torch.tensor(
            HeadConfig(scale=scale).scale * math.cos(math.radians(100)) - shift_for(scale, classes)
        ).exp()
        assert term >= torch.finfo(torch.float32).tiny


def test_initial_centres_do_not_depend_on_the_ranks() -> None:
    whole = initial_centres(0, 9001, 3, seed=5)
    for world_size in (2, 3, 7):
        shards = [shard_of(rank, world_size, 9001) for rank in range(world_size)]
        assert torch.equal(torch.cat([initial_centres(s.start, s.stop, 3, seed=5) for s in shards]), whole)
    assert not torch.equal(initial_centres(0, 4, 3, seed=6), whole[:4])


SAMPLED: dict[str, tuple[dict[str, Any], TargetLogit]] = {
    "plain": ({}, arcface_logit),
    "dense gradient": ({}, arcface_logit),
    "combined": (_COMBINED, LOGITS["combined"]),
    "filter": (_FILTER, arcface_logit),
}


def _sampled(group: dist.ProcessGroup, sample_rate: float, name: str) -> tuple[float, Tensor, Tensor, Tensor]:
    case: Case = {"rows": 8, "classes": 203, "dim": 16, "scale": 64.0}
    x_ND, w_CD, labels_N, _ = _problem(case)
    config = HeadConfig(sample_rate=sample_rate, **SAMPLED[name][0])
    sparse = name != "dense gradient"
    head = PartialFCHead(num_classes=203, embedding_size=16, config=config, group=group, seed=1, sparse_gradient=sparse)
    head.settings = dataclasses.replace(head.settings, chunk=10)
    head.weight.data.copy_(w_CD[head.shard.start : head.shard.stop])
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    x_BD = x_ND[mine].float().requires_grad_()
    batch = gather_batch(F.normalize(x_BD), labels_N[mine], torch.arange(8)[mine], group)
    loss = head(batch, step=3)
    loss.backward()
    grad = head.weight.grad
    assert grad is not None
    assert grad.is_sparse == sparse
    if not sparse:
        rows = grad.abs().sum(1).nonzero()[:, 0]
        grad = torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape)
    assert x_BD.grad is not None
    grad = grad.coalesce()
    return loss.item(), x_BD.grad, grad.indices()[0] + head.shard.start, grad.values()


def _drawn(classes: int, sample_rate: float, *, seed: int, step: int) -> set[int]:
    everything = Shard(0, classes)
    drawn = drawn_classes(everything, classes, sample_rate, seed=seed, step=step, device=torch.device("cpu"))
    return set(drawn.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("sample_rate", "name"),
    [(0.01, "plain"), *((0.3, name) for name in ("plain", "dense gradient", "combined", "filter"))],
)
def test_sampled_head_is_the_dense_head_over_the_sampled_classes(
    ranks: RankPool, world_size: int, sample_rate: float, name: str
) -> None:
    parts = ranks.run(world_size, _sampled, sample_rate, name)
    x_ND, w_CD, labels_N, _ = _problem({"rows": 8, "classes": 203, "dim": 16})
    rows = torch.cat([part[2] for part in parts])
    assert set(labels_N.tolist()) <= set(rows.tolist()), "positives always take part"
    drawn = {row for row in rows.tolist() if row not in set(labels_N.tolist())}
    assert drawn == _drawn(203, sample_rate, seed=1, step=3) - set(labels_N.tolist()), "whatever the number of ranks"
    x_ND.requires_grad_()
    w_SD = w_CD[rows].requires_grad_()
    position = {int(row): at for at, row in enumerate(rows)}
    labels_S = torch.tensor([position[int(label)] for label in labels_N])
    margins = torch.full((len(rows),), 0.5, dtype=torch.float64)
    settings, logit = SAMPLED[name]
    loss = dense_margin_softmax(
        x_ND,
        w_SD,
        labels_S,
        margins,
        scale=64.0,
        target_logit=logit,
        interclass_filter=settings.get("interclass_filter", 0.0),
    )
    loss.backward()
    assert parts[0][0] == pytest.approx(loss.item(), rel=1e-5)
    assert x_ND.grad is not None
    assert w_SD.grad is not None
    assert _relative(torch.cat([part[1] for part in parts]), x_ND.grad) < 1e-5
    assert _relative(torch.cat([part[3] for part in parts]), w_SD.grad) < 1e-5


def _head_for(group: dist.ProcessGroup, margins: int) -> str:
    head = PartialFCHead(num_classes=9, embedding_size=4, config=HeadConfig(), group=group, seed=0)
    batch = gather_batch(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2), group)
    with pytest.raises(ValueError, match="one margin for each of this shard's 9 classes") as error:
        head(batch, step=0, class_margins_C=torch.zeros(margins))
    return str(error.value)


def test_wrong_number_of_margins_is_refused(ranks: RankPool) -> None:
    assert "(5,)" in ranks.run(1, _head_for, 5)[0]


def _collective_counts(group: dist.ProcessGroup) -> dict[str, int]:
    from unittest import mock

    from partial_fc import collectives

    head = PartialFCHead(num_classes=50, embedding_size=8, config=HeadConfig(), group=group, seed=0)
    x_BD = torch.randn(3, 8, requires_grad=True)
    with (
        mock.patch.object(collectives, "_all_gather", wraps=collectives._all_gather) as gather,
        mock.patch.object(collectives, "_reduce_scatter", wraps=collectives._reduce_scatter) as scatter,
        mock.patch.object(collectives.dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        batch = gather_batch(F.normalize(x_BD), torch.arange(3), torch.arange(3), group)
        head(batch, step=0).backward()
    assert reduce.call_args.args[0].numel() == 2 * 3 * dist.get_world_size(group)
    return {"gather": gather.call_count, "scatter": scatter.call_count, "reduce": reduce.call_count}


def test_a_step_runs_three_collectives(ranks: RankPool) -> None:
    assert ranks.run(2, _collective_counts)[0] == {"gather": 1, "scatter": 1, "reduce": 1}
