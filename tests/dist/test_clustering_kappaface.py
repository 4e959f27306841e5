"""KappaFace's margins: sharded against plain float64 arithmetic, finite at the edges, and in a publication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.method.hardness import cohesion, of_all_classes
from clustering.method.kappaface import kappaface_margins
from clustering.reference import dense_kappaface
from sharding import shard_of
from tests.dist.clustering_cases import CASES, Case, by_sample, problem
from tests.dist.service_cases import EPOCH, NOISY, trained
from tests.ranks import WORLD_SIZES, RankPool


def _margins(group: dist.ProcessGroup, x_ND: Tensor, labels_N: Tensor, C: int, margin: float) -> Tensor:
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), C)
    here = ((labels_N >= own.start) & (labels_N < own.stop)).nonzero()[:, 0]
    row_P = labels_N[here] - own.start
    rho_R, _ = cohesion(x_ND[here], row_P, torch.ones_like(row_P, dtype=torch.bool), own.size)
    n_R = torch.bincount(row_P, minlength=own.size).double()
    rho_C, n_C = of_all_classes(torch.stack([rho_R, n_R]), own, C, group)
    return kappaface_margins(rho_C, n_C, dim=x_ND.shape[1], margin=margin)[own.start : own.stop]


def _all(ranks: RankPool, world_size: int, x_ND: Tensor, labels_N: Tensor, C: int) -> Tensor:
    m_C = torch.cat(ranks.run(world_size, _margins, x_ND, labels_N, C, 0.8))
    assert torch.isfinite(m_C).all()
    assert ((m_C >= 0) & (m_C <= 0.8)).all()
    return m_C


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_margins_equal_plain_arithmetic(ranks: RankPool, name: str, world_size: int) -> None:
    x_ND, labels_N, C, _ = problem(CASES[name])
    m_C = _all(ranks, world_size, x_ND, labels_N, C)
    truth_C = torch.tensor(dense_kappaface(x_ND, labels_N, C, 0.8), dtype=torch.float64)
    assert torch.allclose(m_C, truth_C, rtol=0, atol=1e-12)


def _class(n: int, cosine: float, dim: int = 12) -> Tensor:
    """n unit rows, any two at the same cosine."""
    rows_nD = torch.zeros(n, dim, dtype=torch.float64)
    rows_nD[:, 0] = cosine**0.5
    rows_nD[torch.arange(n), 1 + torch.arange(n)] = (1 - cosine) ** 0.5
    return rows_nD


def _problem(*classes: Tensor) -> tuple[Tensor, Tensor, int]:
    sizes = torch.tensor([len(rows) for rows in classes])
    return torch.cat(classes), torch.repeat_interleave(torch.arange(len(classes)), sizes), len(classes)


def test_scattered_and_small_classes_get_larger_margins(ranks: RankPool) -> None:
    by_spread = _all(ranks, 2, *_problem(*(_class(8, cosine) for cosine in (0.9, 0.7, 0.5, 0.1))))
    assert (by_spread.diff() > 0.01).all()
    # r^2 = (1 + (n - 1) cosine) / n is the same for all of these
    by_size = _all(ranks, 2, *_problem(*(_class(n, (n * 0.6 - 1) / (n - 1)) for n in (10, 7, 4, 2))))
    assert (by_size.diff() > 0.01).all()


def test_the_estimate_is_as_biased_as_the_papers(ranks: RankPool) -> None:
    """At the same mean cosine, a pair seems more concentrated than ten samples."""
    m_C = _all(ranks, 1, *_problem(_class(10, 0.3), _class(10, 0.3), _class(2, 0.3)))
    w_s = (torch.cos(torch.pi * torch.tensor([10, 2]) / 10) + 1) / 2
    w_k = (m_C[[0, 2]] / 0.8 - 0.3 * w_s) / 0.7
    assert w_k[1] < w_k[0] - 0.1


_ONE = _class(1, 1.0)
EDGES: dict[str, tuple[tuple[Tensor, ...], list[float] | None]] = {
    "one class": ((_class(5, 0.5),), [0.35]),
    "one sample in all": ((_ONE,), [0.35]),
    "one sample a class": ((_ONE, _ONE, _ONE), [0.35] * 3),
    "equal samples": ((_class(4, 1.0), _class(4, 1.0)), [0.35] * 2),
    "the same concentration": (tuple(_class(3, 0.37) for _ in range(7)), [0.35] * 7),
    "no sample at all": ((_ONE[:0], _ONE[:0]), [1.0, 1.0]),
    "classes without samples": ((_ONE[:0], _class(6, 0.4), _ONE[:0]), [1.0, 0.35, 1.0]),
    "opposite samples": ((torch.cat([_ONE, -_ONE]), _class(2, 0.5)), None),
    "one sample takes the largest concentration": ((_class(4, 0.9), _class(4, 0.2), _ONE), None),
    "equal samples among others": ((_class(4, 1.0), _class(4, 0.2), _class(9, 0.6)), None),
    "nearly equal samples": ((_class(4, 1 - 1e-9), _class(4, 0.2), _class(9, 0.6)), None),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(ranks: RankPool, name: str) -> None:
    classes, shares = EDGES[name]
    truth_C = torch.tensor(dense_kappaface(*_problem(*classes), 0.8), dtype=torch.float64)
    for world_size in WORLD_SIZES:
        m_C = _all(ranks, world_size, *_problem(*classes))
        assert torch.allclose(m_C, truth_C, rtol=0, atol=1e-12)
        if shares is not None:
            assert (m_C / 0.8).tolist() == pytest.approx(shares, abs=1e-12)
        bf16_C = _all(ranks, world_size, _problem(*classes)[0].bfloat16(), *_problem(*classes)[1:])
        assert torch.allclose(bf16_C, truth_C, atol=5e-3)


# ---- in the service --------------------------------------------------------------------------------------------


def _first_publication(group: dist.ProcessGroup, case: Case, wanted: dict[str, Any]) -> dict[str, Any]:
    service = trained(group, case, stop=EPOCH + 2, margin_rule="kappaface", margin=0.8, **wanted)
    p = service._published
    assert p is not None
    points = service.bank.points()
    return {
        "x": (points.sample_P, points.x_PD.clone()),
        "code": p.code_I,
        "m": p.margin_R,
        "smallest": float(p.smallest),
        "mean": p.statistics["margin_mean"],
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_publication_takes_the_rule(ranks: RankPool, gated: bool, world_size: int) -> None:
    """Of the samples that count, with a margin that the bounds of the other rule would refuse."""
    _, labels_N, C, _ = problem(NOISY)
    parts = ranks.run(world_size, _first_publication, NOISY, {"noise_gate": gated})
    kept_N = parts[0]["code"] > 0
    assert bool((parts[0]["code"] < 0).any()) is gated
    x_ND = by_sample([part["x"] for part in parts], len(labels_N))
    truth_C = torch.tensor(dense_kappaface(F.normalize(x_ND[kept_N]), labels_N[kept_N], C, 0.8), dtype=torch.float64)
    m_C = torch.cat([part["m"] for part in parts])
    assert torch.allclose(m_C, truth_C, rtol=0, atol=1e-7)
    assert m_C.max() - m_C.min() > 0.05
    counts_C = torch.bincount(labels_N[kept_N], minlength=C)
    suspects = int((parts[0]["code"] < 0).sum())
    mean = ((m_C * counts_C).sum() + suspects * m_C.min()) / (counts_C.sum() + suspects)
    for part in parts:
        assert part["smallest"] == m_C.min()
        assert part["mean"] == pytest.approx(float(mean)), "of all rows, suspects among them"
