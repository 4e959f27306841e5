"""What is published: hard levels as the dense method says, centres that move as said, and suspects left out of all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.reference import (
    dense_agreement,
    dense_cohesion,
    dense_counts,
    dense_hard_level,
    dense_margins,
    dense_suspects,
)
from clustering.service.published import Published
from clustering.service.service import ClusterService
from partial_fc.collectives import GatheredBatch
from tests.dist.clustering_cases import CASES, Case, by_sample, problem, relative
from tests.dist.service_cases import EPOCH, NOISY, STEPS, batch_at, build, train, trained
from tests.ranks import WORLD_SIZES, RankPool


def _published(service: ClusterService) -> Published:
    assert service._published is not None
    return service._published


def _replaced(batch: GatheredBatch, rows_N: Tensor) -> GatheredBatch:
    """The batch with other embeddings in the rows of `rows_N`; a leaf."""
    x_ND = torch.where(rows_N[:, None], F.normalize(1 - batch.x_ND.flip(1)), batch.x_ND).detach().requires_grad_()
    return GatheredBatch(x_ND, batch.labels_N, batch.sample_ids_N, batch.group)


# ---- hard levels -----------------------------------------------------------------------------------------------


def _first_publication(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    service = trained(group, case, stop=EPOCH + 2, centre_momentum=0.0)
    p = _published(service)
    assert p.version == 1
    points = service.bank.points()
    return {"x": (points.sample_P, points.x_PD), "code": p.code_I, "h": p.hard_R, "f": p.f_R, "m": p.margin_R}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["labels confused", "long tail", "classes without samples"])
def test_first_publication_equals_the_dense_method(ranks: RankPool, name: str, world_size: int) -> None:
    """From the published cluster of every sample on: F, h and m of the samples that are no suspects."""
    _, labels_N, C, K = problem(CASES[name])
    parts = ranks.run(world_size, _first_publication, CASES[name])
    x_ND = by_sample([part["x"] for part in parts], len(labels_N))
    code_N = parts[0]["code"].long()
    assert torch.equal(code_N < 0, dense_suspects(labels_N, code_N.abs() - 1, C, K))
    assert (code_N < 0).any()
    kept_N, suspects = code_N > 0, int((code_N < 0).sum())
    t_CK = dense_counts(labels_N[kept_N], code_N[kept_N] - 1, C, K)
    f_C, rho_C = dense_agreement(t_CK), dense_cohesion(x_ND[kept_N], labels_N[kept_N], C)
    h_C = dense_hard_level(f_C, rho_C, t_CK.sum(1), 0.7, 5.0)
    m_C = dense_margins(h_C, t_CK.sum(1), suspects, margin=0.5, low=0.35, high=0.65, delta=0.1, direction=1)
    for key, truth in (("f", f_C), ("h", h_C), ("m", m_C)):
        found = torch.cat([part[key] for part in parts]).double()
        assert torch.allclose(found, truth, atol=1e-6 if key == "f" else 1e-9), key


def _published_without(group: dist.ProcessGroup) -> tuple[list[str], int]:
    """A publication made from the same run twice, the second time with other embeddings of the suspects."""
    service = build(group, NOISY)
    train(service, NOISY, stop=2 * EPOCH)
    refresh = service._refresh
    assert refresh is not None
    while refresh.run.advance():
        pass
    suspect_P = (refresh.run.index_P >= 0) & ~refresh.run.counted_P
    state = refresh.state_dict()
    versions = []
    for turned in (False, True):
        again = service._new_refresh()
        again.load_state_dict(state)
        if turned:
            again.points.x_PD[suspect_P] = -again.points.x_PD[suspect_P].flip(1)
        while again.done < again.length:
            again.advance()
        assert again.published is not None
        versions.append(again.published.state_dict())
    first, second = versions
    differs = [
        key
        for key, value in first.items()
        if not (torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key])
    ]
    return differs, int(suspect_P.sum())


def test_suspects_touch_no_hard_level_margin_centre_or_anchor(ranks: RankPool) -> None:
    found = ranks.run(2, _published_without)
    assert [differs for differs, _ in found] == [[], []]
    assert sum(suspects for _, suspects in found) > 5


def _two_levels(group: dist.ProcessGroup, momentum: float) -> list[Tensor]:
    service = build(group, NOISY, hard_level_momentum=momentum)
    levels: list[Tensor] = []
    for stop in range(STEPS):
        train(service, {**NOISY, "drift": 0.2}, start=stop, stop=stop + 1)
        if service.version > len(levels):
            levels.append(_published(service).hard_R)
    return levels


def test_hard_levels_are_averaged_over_refreshes(ranks: RankPool) -> None:
    fresh, averaged = ranks.run(1, _two_levels, 0.0)[0], ranks.run(1, _two_levels, 0.25)[0]
    assert len(fresh) == 3
    assert torch.equal(averaged[0], fresh[0])
    assert not torch.equal(fresh[1], fresh[0])
    assert torch.allclose(averaged[1], 0.25 * fresh[0] + 0.75 * fresh[1])
    assert torch.allclose(averaged[2], 0.25 * averaged[1] + 0.75 * fresh[2])


# ---- suspects in a step ----------------------------------------------------------------------------------------


def _suspects_in_a_step(group: dist.ProcessGroup) -> list[dict[str, Any]]:
    service = trained(group, NOISY)
    found = []
    for step in range(7):
        batch = batch_at(group, NOISY, step)[1]
        p = _published(service)
        cluster_N, suspect_N = p.cluster_of(batch)
        other = _replaced(batch, suspect_N)
        plain, changed = service.contrastive(batch), service.contrastive(other)
        changed.backward()
        assert other.x_ND.grad is not None
        before = p.state_dict()
        moved = []
        for rows in (batch, other):
            copy = Published.from_state_dict(before, rows.x_ND.device)
            copy.move(rows, 0.9, service.clusters, service.classes.start)
            moved.append((copy.c_SD, copy.anchor_RD))
        here_N = (batch.labels_N >= service.classes.start) & (batch.labels_N < service.classes.stop)
        margin_N = service.row_margins(batch)
        own_N = service.margins_C[(batch.labels_N - service.classes.start)[here_N & ~suspect_N]]
        found.append(
            {
                "suspects": int(suspect_N.sum()),
                "coded": bool((cluster_N >= 0).all()),
                "loss": plain.item() == changed.item() and plain.item() > 0,
                "gradient": bool((other.x_ND.grad[suspect_N] == 0).all()),
                "centres": torch.equal(moved[0][0], moved[1][0]) and torch.equal(moved[0][1], moved[1][1]),
                "moves": not torch.equal(moved[0][0], p.c_SD),
                "margin": bool((margin_N[here_N & suspect_N] == p.smallest.float()).all()),
                "margins": (float(p.smallest), p.margin_R.tolist()),
                "others": torch.equal(margin_N[here_N & ~suspect_N], own_N),
            }
        )
    return found


def test_suspects_move_no_centre_have_no_contrast_and_the_smallest_margin(ranks: RankPool) -> None:
    parts = ranks.run(2, _suspects_in_a_step)
    for steps in zip(*parts, strict=True):
        said, margins = zip(*(step.pop("margins") for step in steps), strict=True)
        assert set(said) == {min(itertools.chain(*margins))}, "of the classes of all ranks"
    for part in parts:
        assert sum(step.pop("suspects") for step in part) > 5
        assert all(all(step.values()) for step in part), part


# ---- centres between refreshes ---------------------------------------------------------------------------------


def _moves(group: dist.ProcessGroup, case: Case, momentum: float) -> dict[str, Any]:
    """One publication, then steps of drifting embeddings: centres before and after, and the batches between."""
    drifting = {**case, "drift": 0.3}
    service = trained(group, case, stop=EPOCH + 2, centre_momentum=momentum)
    p = _published(service)
    before = p.c_SD.clone()
    batches = []
    for step in range(EPOCH + 2, EPOCH + 8):
        batch = batch_at(group, drifting, step)[1]
        service.observe(batch)
        cluster_N, suspect_N = p.cluster_of(batch)
        batches.append((batch.x_ND.detach(), torch.where(suspect_N, -1, cluster_N)))
    anchors = p.anchor_RD
    assert not p.c_SD.requires_grad
    assert not anchors.requires_grad
    return {"before": before, "after": p.c_SD, "anchor": anchors, "class_K": p.class_K, "batches": batches}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", ["labels confused", "more clusters than samples", "fewer classes than ranks"])
def test_centres_move_as_the_method_says_and_anchors_with_them(
    ranks: RankPool, name: str, momentum: float, world_size: int
) -> None:
    parts = ranks.run(world_size, _moves, CASES[name], momentum)
    c_KD = torch.cat([part["before"] for part in parts])
    exists_K = (c_KD != 0).any(1)
    truth_KD = c_KD.double()
    for x_ND, cluster_N in parts[0]["batches"]:
        for k in sorted({int(k) for k in cluster_N if k >= 0}):
            mean_D = x_ND[cluster_N == k].double().mean(0)
            truth_KD[k] = F.normalize(momentum * truth_KD[k] + (1 - momentum) * mean_D, dim=0)
    found_KD = torch.cat([part["after"] for part in parts])
    assert relative(found_KD, truth_KD) < 1e-6
    assert relative(found_KD, c_KD) > 0.01, "they did move"
    assert ((found_KD[exists_K].norm(dim=1) - 1).abs() < 1e-6).all()
    assert torch.equal(found_KD[~exists_K], torch.zeros_like(found_KD[~exists_K]))
    anchor_CD = torch.cat([part["anchor"] for part in parts])
    class_K = parts[0]["class_K"]
    matched = (class_K >= 0).nonzero()[:, 0]
    assert len(matched) > 0
    assert torch.equal(anchor_CD[class_K[matched]], found_KD[matched]), "the same bits, wherever both lie"


def _rows_that_do_not_count(group: dist.ProcessGroup) -> list[bool]:
    service = trained(group, NOISY)
    p = _published(service)
    batch = batch_at(group, NOISY, 0)[1]
    unlabelled = GatheredBatch(batch.x_ND, torch.full_like(batch.labels_N, -1), batch.sample_ids_N, group)
    unknown = GatheredBatch(batch.x_ND, batch.labels_N, torch.tensor([-1, 90, 10**9] * 4), group)
    before, bank = p.c_SD.clone(), service.bank.points().x_PD.clone()
    found = []
    for rows in (unlabelled, unknown):
        service.observe(rows)
        same = torch.equal(p.c_SD, before) and torch.equal(service.bank.points().x_PD, bank)
        found += [same, not bool(p.cluster_of(rows)[1].any())]
    found.append(bool((service.row_margins(unlabelled) == 0.5).all()))
    return found


def test_rows_without_label_or_sample_are_left_alone(ranks: RankPool) -> None:
    for part in ranks.run(2, _rows_that_do_not_count):
        assert part == [True] * 5
