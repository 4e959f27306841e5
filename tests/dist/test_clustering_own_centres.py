"""Centres of their owners' samples alone, and means of classes that own no cluster: made and moved as is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.dist.clustering_cases import CASES, Case, problem, relative
from tests.dist.service_cases import EPOCH, batch_at, trained
from tests.ranks import WORLD_SIZES, RankPool

CONFUSED: Case = {"sizes": [9, 2, 8, 2, 9, 2, 8, 2, 3], "dim": 4, "extra": 0, "spread": 0.7, "flipped": 9, "seed": 0}
"""Without a gate: samples of classes that do not own their cluster, and classes that own none."""
FIRST = EPOCH + 2


def _run(group: dist.ProcessGroup, case: Case, own: bool) -> dict[str, Any]:
    service = trained(group, case, stop=FIRST, noise_gate=False, own_centres=own, centre_momentum=0.9)
    p = service._published
    assert p is not None
    assert p.version == 1
    pulled = p.pulled(service.clusters, service.classes.start)
    count = len(pulled.rows_XD) - len(p.c_SD)
    class_L = pulled.class_X[pulled.stop : pulled.stop + count]
    made, mean_LD = p.c_SD.clone(), pulled.rows_XD[len(p.c_SD) :]
    found = {"made": made, "class": class_L, "mean": mean_LD.clone(), "code": p.code_I, "owner": p.owner_K}
    batches = []
    for step in range(FIRST, FIRST + 4):
        batch = batch_at(group, {**case, "drift": 0.3}, step)[1]
        service.observe(batch)
        batches.append((batch.x_ND.detach(), batch.labels_N, p.code_I[batch.sample_ids_N].long() - 1))
    anchor_LD = p.anchor_RD[class_L - service.classes.start]
    return {**found, "moved": p.c_SD, "mean moved": mean_LD, "anchor": anchor_LD, "batches": batches}


def _mean(x_ND: Tensor, rows_N: Tensor) -> Tensor:
    return F.normalize(x_ND[rows_N].double().mean(0), dim=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nobody_else_is_in_them(ranks: RankPool, world_size: int) -> None:
    x_ND, labels_N, _, K = problem(CONFUSED)
    parts = ranks.run(world_size, _run, CONFUSED, True)
    code_N, owner_K = parts[0]["code"].long() - 1, parts[0]["owner"]
    assert (owner_K[code_N] != labels_N).sum() > 3, "else the case shows nothing"
    lone = sorted(set(labels_N.tolist()) - set(owner_K.tolist()))
    assert torch.cat([part["class"] for part in parts]).tolist() == lone
    assert len(lone) > 1
    made_KD, mean_LD = (torch.cat([part[name] for part in parts]) for name in ("made", "mean"))
    for k in range(K):
        own_N = (code_N == k) & (labels_N == owner_K[k])
        assert own_N.any()
        assert relative(made_KD[k], _mean(x_ND, own_N)) < 1e-6
    for row, y in enumerate(lone):
        assert relative(mean_LD[row], _mean(x_ND, labels_N == y)) < 1e-6

    truth = {k: made_KD[k].double() for k in range(K)} | {K + y: mean_LD[row].double() for row, y in enumerate(lone)}
    for x_nD, labels_n, cluster_n in parts[0]["batches"]:
        rows_n = torch.where(owner_K[cluster_n] == labels_n, cluster_n, K + labels_n)
        for row in set(rows_n.tolist()) & truth.keys():
            truth[row] = F.normalize(0.9 * truth[row] + 0.1 * x_nD[rows_n == row].double().mean(0), dim=0)
    moved_KD, moved_LD, anchor_LD = (torch.cat([part[n] for part in parts]) for n in ("moved", "mean moved", "anchor"))
    assert relative(moved_KD, torch.stack([truth[k] for k in range(K)])) < 1e-6
    assert relative(moved_LD, torch.stack([truth[K + y] for y in lone])) < 1e-6
    assert relative(moved_LD, mean_LD) > 0.01, "they did move"
    assert torch.equal(anchor_LD, moved_LD)


def test_without_the_setting_all_of_a_cluster_are(ranks: RankPool) -> None:
    x_ND, labels_N, _, K = problem(CONFUSED)
    (part,) = ranks.run(1, _run, CONFUSED, False)
    code_N = part["code"].long() - 1
    assert not len(part["class"])
    for k in range(K):
        assert relative(part["made"][k], _mean(x_ND, code_N == k)) < 1e-6
    assert any(len(set(labels_N[code_N == k].tolist())) > 1 for k in range(K))


def _losses(group: dist.ProcessGroup, case: Case) -> list[float]:
    service = trained(group, case, noise_gate=False)
    batches = [batch_at(group, case, step)[1] for step in range(4)]
    return [service.contrastive(batch).item() for batch in batches]


def _dense_losses(group: dist.ProcessGroup, case: Case) -> list[float]:
    """By every row against every other, in float64: the formula of docs/method.md."""
    service = trained(group, case, noise_gate=False)
    p = service._published
    assert p is not None
    pulled = p.pulled(service.clusters, service.classes.start)
    owner_X = torch.cat([p.owner_K, pulled.class_X[service.num_clusters :]])
    weight_X = torch.cat([p.weight_K.double(), torch.ones(len(owner_X) - len(p.owner_K), dtype=torch.float64)])
    found = []
    for step in range(4):
        batch = batch_at(group, case, step)[1]
        e_NX = (batch.x_ND.double() @ pulled.rows_XD.double().T / service.config.temperature).exp()
        own_NX = owner_X == batch.labels_N[:, None]
        p_N, o_N = (own_NX * weight_X * e_NX).sum(1), (~own_NX & (owner_X >= 0)).double().mul(e_NX).sum(1)
        assert (p_N > 0).all(), "every class has something to be pulled to"
        found.append(torch.log1p(o_N / p_N).mean().item())
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_loss_pulls_to_them(ranks: RankPool, world_size: int) -> None:
    truth = ranks.run(1, _dense_losses, CONFUSED)[0]
    for losses in ranks.run(world_size, _losses, CONFUSED):
        assert losses == pytest.approx(truth, rel=1e-5)


def _unowned(group: dist.ProcessGroup) -> bool:
    """A rank without classes, or a set in which every class owns a cluster, has no further rows."""
    service = trained(group, CASES["fewer classes than ranks"])
    p = service._published
    assert p is not None
    return len(p.pulled(service.clusters, service.classes.start).rows_XD) == len(p.c_SD)


def test_with_a_cluster_for_each_class_there_is_nothing_more(ranks: RankPool) -> None:
    assert ranks.run(4, _unowned) == [True] * 4
