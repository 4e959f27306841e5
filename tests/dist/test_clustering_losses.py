"""Contrastive and alignment loss over ranks against dense float64, values and gradients, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.method.align import alignment_loss
from clustering.method.contrastive import contrastive_loss
from clustering.reference import dense_alignment, dense_contrastive
from clustering.step import plain
from clustering.step.plain import Columns
from sharding import shard_of
from tests.dist.clustering_cases import Case, gathered, relative
from tests.ranks import WORLD_SIZES, RankPool

CASES: dict[str, Case] = {
    "odd shapes": {"rows": 12, "classes": 37, "clusters": 41, "dim": 7},
    "more than one tile": {"rows": 8, "classes": 150, "clusters": 507, "dim": 17, "tile": 1},
    "one row a rank": {"rows": 4, "classes": 9, "clusters": 11, "dim": 5},
    "ranks without classes or clusters": {"rows": 8, "classes": 3, "clusters": 3, "dim": 4},
    "classes without a cluster": {"rows": 16, "classes": 13, "clusters": 15, "dim": 6, "bare": (0, 1, 5, 12)},
    "classes of several clusters": {"rows": 16, "classes": 5, "clusters": 23, "dim": 6},
    "empty clusters": {"rows": 8, "classes": 4, "clusters": 19, "dim": 6, "empty": (0, 3, 11, 18)},
    "unlabelled and suspect rows": {
        "rows": 12, "classes": 9, "clusters": 11, "dim": 6, "unlabelled": (0, 5, 11), "suspect": (1, 5, 8),
    },
    "well learned": {"rows": 8, "classes": 29, "clusters": 33, "dim": 64, "pull": 9.0},
    "far from their clusters": {"rows": 8, "classes": 29, "clusters": 33, "dim": 16, "pull": -4.0},
    "sharp": {"rows": 8, "classes": 29, "clusters": 33, "dim": 16, "tau": 0.021},
    "one class": {"rows": 8, "classes": 1, "clusters": 5, "dim": 6},
}  # fmt: skip


def _problem(case: Case) -> dict[str, Tensor]:
    """float64 rows near their class's cluster, owners of clusters, raw class centres, anchors and F."""
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    N, C, K, D = case["rows"], case["classes"], case["clusters"], case["dim"]
    c_KD = F.normalize(torch.randn(K, D, generator=generator, dtype=torch.float64))
    owner_K = torch.cat([torch.arange(C), torch.randint(0, C, (K - C,), generator=generator)])
    owner_K = owner_K[torch.randperm(K, generator=generator)]
    for k in case.get("empty", ()):
        owner_K[k] = -1
    for y in case.get("bare", ()):
        owner_K[owner_K == y] = -1
    share_K = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1
    weight_K = torch.stack([share / share_K[owner_K == y].sum() for share, y in zip(share_K, owner_K, strict=True)])
    labels_N = torch.randint(0, C, (N,), generator=generator)
    near_N = torch.tensor([int((owner_K == y).double().argmax()) for y in labels_N])
    noise_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    x_ND = F.normalize(noise_ND + case.get("pull", 1.0) * c_KD[near_N])
    suspect_N = torch.zeros(N, dtype=torch.bool)
    for row in case.get("suspect", ()):
        suspect_N[row] = True
    for row in case.get("unlabelled", ()):
        labels_N[row] = -1
    w_CD = torch.randn(C, D, generator=generator, dtype=torch.float64)
    return {
        "x": x_ND,
        "labels": labels_N,
        "suspect": suspect_N,
        "c": c_KD,
        "owner": owner_K,
        "weight": weight_K,
        "w": w_CD * (torch.rand(C, 1, generator=generator, dtype=torch.float64) + 0.1),
        "anchor": F.normalize(w_CD + torch.randn(C, D, generator=generator, dtype=torch.float64)),
        "f": torch.rand(C, generator=generator, dtype=torch.float64),
    }


# ---- contrastive -----------------------------------------------------------------------------------------------


def _contrastive(group: dist.ProcessGroup, p: dict[str, Tensor], wanted: Case) -> dict[str, Any]:
    K = len(p["owner"])
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), K)
    part = slice(own.start, own.stop)
    c_SD = p["c"][part].float().requires_grad_()
    columns = Columns.build(
        cluster_S=p.get("cluster", torch.arange(K))[part],
        c_SD=c_SD,
        owner_S=p["owner"][part],
        weight_S=p["weight"][part].float(),
    )
    x_BD, batch = gathered(group, p["x"], p["labels"], torch.arange(len(p["x"])))
    usual = dict(plain.TILE_NUMBERS)
    plain.TILE_NUMBERS["cpu"] = wanted.get("tile", usual["cpu"])
    try:
        loss = contrastive_loss(
            batch,
            columns,
            p["suspect"],
            temperature=wanted.get("tau", 0.1),
            product_dtype=wanted.get("product_dtype", torch.float32),
        )
    finally:
        plain.TILE_NUMBERS.update(usual)
    (wanted.get("factor", 1.0) * loss).backward()
    return {"loss": loss.item(), "x": x_BD.grad, "c": c_SD.grad}


def _dense_contrastive(p: dict[str, Tensor], tau: float = 0.1) -> tuple[float, Tensor]:
    x_ND = p["x"].float().double().requires_grad_()  # the rows that the ranks are given
    taken_N = (p["labels"] >= 0) & ~p["suspect"]
    centres = (p["c"].float().double(), p["owner"], p["weight"])
    loss = dense_contrastive(x_ND, p["labels"], taken_N, *centres, tau)
    loss.backward()
    assert x_ND.grad is not None
    return loss.item(), x_ND.grad


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_contrastive_equals_dense(ranks: RankPool, name: str, world_size: int) -> None:
    case = CASES[name]
    loss, grad_x = _dense_contrastive(_problem(case), case.get("tau", 0.1))
    parts = ranks.run(world_size, _contrastive, _problem(case), case)
    for part in parts:
        assert part["loss"] == pytest.approx(loss, rel=1e-5, abs=0)
        assert part["loss"] >= 0
        assert part["c"] is None, "centres get no gradient"
    assert relative(torch.cat([part["x"] for part in parts]), grad_x) < 1e-5


def test_contrastive_of_one_row(ranks: RankPool) -> None:
    p = _problem({"rows": 1, "classes": 7, "clusters": 8, "dim": 5})
    truth, grad_x = _dense_contrastive(p)
    (found,) = ranks.run(1, _contrastive, p, {})
    assert found["loss"] == pytest.approx(truth, rel=1e-5, abs=0)
    assert relative(found["x"], grad_x) < 1e-5


def test_gradient_follows_the_factor_of_the_loss(ranks: RankPool) -> None:
    p = _problem(CASES["odd shapes"])
    grad_x = _dense_contrastive(p)[1]
    parts = ranks.run(2, _contrastive, p, {"factor": -0.37})
    assert relative(torch.cat([part["x"] for part in parts]), -0.37 * grad_x) < 1e-5


def test_reduced_products_stay_near(ranks: RankPool) -> None:
    p = _problem(CASES["odd shapes"])
    loss, grad_x = _dense_contrastive(p)
    parts = ranks.run(2, _contrastive, p, {"product_dtype": torch.bfloat16})
    assert parts[0]["loss"] == pytest.approx(loss, rel=0.02)
    assert parts[0]["loss"] != pytest.approx(loss, rel=1e-6), "operands are rounded"
    assert relative(torch.cat([part["x"] for part in parts]), grad_x) < 0.03


def test_order_of_rows_and_of_columns_does_not_matter(ranks: RankPool) -> None:
    p = _problem(CASES["unlabelled and suspect rows"])
    base = ranks.run(2, _contrastive, p, {})
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    q = {**p, **{name: p[name][rows] for name in ("x", "labels", "suspect")}}
    q |= {name: p[name][columns] for name in ("c", "owner", "weight")}
    found = ranks.run(2, _contrastive, q, {})
    assert found[0]["loss"] == pytest.approx(base[0]["loss"], rel=1e-6)
    base_x = torch.cat([part["x"] for part in base])
    assert relative(torch.cat([part["x"] for part in found]), base_x[rows]) < 1e-6


def test_a_candidate_that_comes_again_changes_nothing(ranks: RankPool) -> None:
    p = _problem(CASES["odd shapes"])
    (base,) = ranks.run(1, _contrastive, p, {})
    again = torch.tensor([*range(41), 3, 3, 40, 0])
    q = {**p, "cluster": again, **{name: p[name][again] for name in ("c", "owner", "weight")}}
    (found,) = ranks.run(1, _contrastive, q, {})
    assert found["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert relative(found["x"], base["x"]) < 1e-6
    (counted,) = ranks.run(1, _contrastive, {**q, "cluster": torch.arange(45)}, {})
    assert counted["loss"] != pytest.approx(base["loss"], rel=1e-3), "as other clusters they would count"


def test_fragments_of_the_own_class_are_no_negatives(ranks: RankPool) -> None:
    p = _problem(CASES["one class"])
    parts = ranks.run(2, _contrastive, p, {})
    assert [part["loss"] for part in parts] == [0.0, 0.0]
    for part in parts:
        assert (part["x"] == 0).all()


def test_suspects_do_not_touch_the_loss(ranks: RankPool) -> None:
    """Wherever a suspect lies, the loss is the same, it gets no gradient, and it is not counted in the mean."""
    p = _problem(CASES["unlabelled and suspect rows"])
    base = ranks.run(2, _contrastive, p, {})
    left_out_N = p["suspect"] | (p["labels"] < 0)
    q = {**p, "x": torch.where(left_out_N[:, None], -p["x"].flip(1), p["x"])}
    found = ranks.run(2, _contrastive, q, {})
    assert found[0]["loss"] == base[0]["loss"]
    grad_x = torch.cat([part["x"] for part in found])
    assert torch.equal(grad_x, torch.cat([part["x"] for part in base]))
    assert (grad_x[left_out_N] == 0).all()
    assert (grad_x[~left_out_N] != 0).any(1).all()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("why", ["suspect", "unlabelled", "no clusters"])
def test_no_row_that_takes_part_gives_zero(ranks: RankPool, why: str, world_size: int) -> None:
    p = _problem(CASES["odd shapes"])
    left_out = {
        "suspect": {"suspect": torch.ones(12, dtype=torch.bool)},
        "unlabelled": {"labels": torch.full((12,), -1)},
        "no clusters": {"owner": torch.full((41,), -1)},
    }
    for part in ranks.run(world_size, _contrastive, {**p, **left_out[why]}, {}):
        assert part["loss"] == 0
        assert (part["x"] == 0).all()


# ---- alignment -------------------------------------------------------------------------------------------------


def _alignment(group: dist.ProcessGroup, p: dict[str, Tensor], need_w: bool = True) -> dict[str, Any]:
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), len(p["w"]))
    part = slice(own.start, own.stop)
    w_RD = p["w"][part].float().requires_grad_(need_w)
    anchor_RD = p["anchor"][part].float().requires_grad_()
    f_R = p["f"][part].float()
    x_BD, batch = gathered(group, p["x"], p["labels"], torch.arange(len(p["x"])))
    loss = alignment_loss(batch, w_RD, anchor_RD.detach(), f_R, own.start)
    found: dict[str, Any] = {"loss": loss.item(), "needs": loss.requires_grad}
    if need_w:
        (2.5 * loss).backward()
        grad = w_RD.grad
        assert grad is not None
        found |= {"sparse": grad.is_sparse, "w": grad.to_dense() / 2.5}
        found["rows"] = (grad.to_dense().any(1).nonzero()[:, 0] + own.start).tolist()
        found["named"] = (grad.coalesce().indices()[0] + own.start).tolist()
        found["first"] = own.start
    return {**found, "x": x_BD.grad}


def _check_alignment(parts: list[dict[str, Any]], p: dict[str, Tensor]) -> None:
    w_CD = p["w"].float().double().requires_grad_()
    loss = dense_alignment(p["labels"], w_CD, p["anchor"].float().double(), p["f"])
    loss.backward()
    assert w_CD.grad is not None
    for part in parts:
        assert part["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=0)
        assert part["sparse"]
        assert part["x"] is None, "embeddings get no gradient"
    grad_w = torch.cat([part["w"] for part in parts])
    assert relative(grad_w, w_CD.grad) < 1e-5
    rows = [row for part in parts for row in part["rows"]]
    batch = {y for y in p["labels"].tolist() if y >= 0}
    assert rows == sorted(batch), "rows of the batch's classes"
    for part in parts:
        assert set(part["named"]) <= (set(part["rows"]) or {part["first"]}), "others are not even named"
    along_C = (grad_w.double() * F.normalize(p["w"])).sum(1).abs()
    assert (along_C <= 1e-6 * grad_w.double().norm(dim=1).clamp_min(1e-30)).all(), "tangent to the class centre"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_alignment_equals_dense(ranks: RankPool, name: str, world_size: int) -> None:
    p = _problem(CASES[name])
    _check_alignment(ranks.run(world_size, _alignment, p), p)


def _alignment_of_subcentres(group: dist.ProcessGroup, p: dict[str, Tensor], w_CKD: Tensor) -> tuple[float, Tensor]:
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), len(w_CKD))
    part = slice(own.start, own.stop)
    w_RD = w_CKD[part].flatten(0, 1).float().requires_grad_()
    _, batch = gathered(group, p["x"], p["labels"], torch.arange(len(p["x"])))
    loss = alignment_loss(batch, w_RD, p["anchor"][part].float(), p["f"][part].float(), own.start)
    loss.backward()
    assert w_RD.grad is not None
    return loss.item(), w_RD.grad.to_dense()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_alignment_draws_the_nearest_subcentre(ranks: RankPool, world_size: int) -> None:
    p = _problem(CASES["odd shapes"])
    w_CKD = torch.randn(len(p["w"]), 3, p["w"].shape[1], generator=torch.Generator().manual_seed(1)).double()
    parts = ranks.run(world_size, _alignment_of_subcentres, p, w_CKD)
    w_CKD.requires_grad_()
    anchor_CD = p["anchor"].float().double()
    nearest_C = (F.normalize(w_CKD.detach(), dim=2) * anchor_CD[:, None]).sum(2).argmax(1)
    loss = dense_alignment(p["labels"], w_CKD[torch.arange(len(w_CKD)), nearest_C], anchor_CD, p["f"])
    loss.backward()
    assert w_CKD.grad is not None
    assert parts[0][0] == pytest.approx(loss.item(), rel=1e-5)
    assert relative(torch.cat([part[1] for part in parts]), w_CKD.grad.flatten(0, 1)) < 1e-5


def test_alignment_of_one_row(ranks: RankPool) -> None:
    p = _problem({"rows": 1, "classes": 7, "clusters": 8, "dim": 5})
    _check_alignment(ranks.run(1, _alignment, p), p)


def test_alignment_of_frozen_class_centres_has_the_same_value_and_no_graph(ranks: RankPool) -> None:
    p = _problem(CASES["odd shapes"])
    base, frozen = ranks.run(2, _alignment, p), ranks.run(2, _alignment, p, False)
    assert [part["loss"] for part in frozen] == [part["loss"] for part in base]
    assert [part["needs"] for part in (*base, *frozen)] == [True, True, False, False]


def test_alignment_counts_a_class_once_however_often_it_comes(ranks: RankPool) -> None:
    p = _problem({**CASES["one row a rank"], "rows": 8})
    p["labels"] = torch.tensor([4, 4, 4, 4, 4, 0, 8, 0])
    _check_alignment(ranks.run(4, _alignment, p), p)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_alignment_of_a_batch_without_labels_is_zero(ranks: RankPool, world_size: int) -> None:
    p = _problem(CASES["odd shapes"])
    for part in ranks.run(world_size, _alignment, {**p, "labels": torch.full((12,), -1)}):
        assert part["loss"] == 0
        assert part["rows"] == []
        assert (part["w"] == 0).all()
