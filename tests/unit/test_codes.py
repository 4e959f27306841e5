"""Products of small codes, and the nearest centres by them, against float64 truth.

Legend: b points, s centres, D embedding size.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clustering.lloyd import codes as lloyd_codes
from clustering.lloyd.codes import PointCodes, codes_pay
from clustering.nearest import by_codes as nearest_codes
from clustering.nearest.codes import Codes, Rotation, can_code, can_multiply, code_centres, code_points
from clustering.nearest.nearest import Nearest
from clustering.service.rows import TensorRows, UnitRows
from tests import nearest_cases
from tests.nearest_cases import CODES, compare_, unit


def _alike(rows: int, D: int) -> Tensor:
    """All but equal to one row of equal numbers: without a rotation all round the same way."""
    return F.normalize(torch.ones(rows, D) + 1e-3 * unit(rows, D, seed=3))


def _single(rows: int, D: int) -> Tensor:
    """One number each that is not zero."""
    return F.one_hot(torch.arange(rows) % D, D).float() * (1 - 2 * (torch.arange(rows) % 2))[:, None]


def _smooth(rows: int, D: int) -> Tensor:
    return F.normalize(torch.cos(torch.arange(1, rows + 1)[:, None] * torch.linspace(0, 1, D)))


def _few_values(rows: int, D: int) -> Tensor:
    return F.normalize(unit(rows, D, seed=4).sign() + 0.25)


def _low_rank(rows: int, D: int) -> Tensor:
    return F.normalize(unit(rows, 2, seed=5) @ unit(2, D, seed=6))


SHAPES: dict[str, Callable[[int, int], Tensor]] = {
    "anywhere": lambda rows, D: unit(rows, D, seed=2),
    "alike": _alike,
    "single": _single,
    "smooth": _smooth,
    "few values": _few_values,
    "low rank": _low_rank,
}


def test_this_build_multiplies_codes() -> None:
    assert can_multiply() or platform.machine() not in ("x86_64", "AMD64")


@pytest.mark.parametrize("D", [7, 64, 123, 512])
@pytest.mark.parametrize("name", SHAPES)
def test_cosines_are_as_near_as_they_say(name: str, D: int) -> None:
    """To centres of the same kind and to themselves; and the error is small, or half of this would say nothing."""
    x_bD = SHAPES[name](252, D)
    turned_bE = Rotation(D).turned(x_bD)
    codes_b, coded = code_points(turned_bE.clone()), code_centres(x_bD, Rotation(D).turned, tile=100)
    found_bs = torch.cat([cosine_bt for _, cosine_bt in coded.products(codes_b)], dim=1) * codes_b.step_b[:, None]
    assert [left for left, _ in coded.products(codes_b)] == [0, 100, 200]
    error_b = coded.errors(codes_b)
    off_bs = (found_bs.double() - x_bD.double() @ x_bD.double().T).abs()
    assert (off_bs <= error_b[:, None]).all()
    assert error_b.max() < 0.02


def test_errors_are_as_many_deviations_as_they_say() -> None:
    """A six part of the allowed error is one deviation of what they are off."""
    x_bD, centres_sD = unit(700, 512, seed=1), unit(507, 512, seed=2)
    turned = Rotation(512).turned
    codes_b, coded = code_points(turned(x_bD)), code_centres(centres_sD, turned, tile=512)
    ((_, found_bs),) = coded.products(codes_b)
    off_bs = found_bs.double() * codes_b.step_b[:, None] - x_bD.double() @ centres_sD.double().T
    deviations_bs = off_bs / (coded.errors(codes_b)[:, None] / 6)
    assert 0.8 < deviations_bs.std() < 1.0
    assert deviations_bs.abs().max() < 6


@pytest.mark.parametrize("D", [1, 7, 64, 130])
def test_a_rotation_keeps_cosines(D: int) -> None:
    x_bD = unit(40, D, seed=1)
    turned_bE = Rotation(D).turned(x_bD)
    assert turned_bE.shape == (40, -(-D // 64) * 64)
    torch.testing.assert_close(turned_bE @ turned_bE.T, x_bD @ x_bD.T, rtol=0, atol=1e-6)
    assert torch.equal(turned_bE, Rotation(D).turned(x_bD))


def test_codes_of_zero_rows_and_of_chosen_rows() -> None:
    codes_b = code_points(torch.tensor([[0.0] * 64, [0.5] * 64]))
    assert codes_b.code_bE.unique(dim=1).tolist() == [[64], [127]]
    assert isinstance(codes_b[1:], Codes)
    assert codes_b[torch.tensor([1])].step_b.tolist() == [pytest.approx(0.5 / 63)]


def test_ties_go_to_the_smaller_cluster_in_any_order_of_tiles() -> None:
    nearest_cases.check_ties("cpu", False, CODES)


def test_data_that_has_collapsed_is_told_apart_exactly() -> None:
    nearest_cases.check_collapsed("cpu", False, CODES)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("points", "centres", "D"), [(1, 1, 7), (123, 252, 507), (507, 7, 123), (2100, 600, 33)])
@pytest.mark.parametrize(("tile", "crowd"), [(16, 0), (16, 32), (1, 32), (1024, 32)])
def test_the_nearest_and_the_next(
    points: int, centres: int, D: int, known: bool, tile: int, crowd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 1: only two of all that were seen before may still be left out. crowd: 0: all in float32."""
    monkeypatch.setattr(nearest_codes, "_CROWD", crowd)
    x_bD, centres_sD = unit(points, D, seed=1), unit(centres, D, seed=2)
    true_bs = x_bD.double() @ centres_sD.double().T
    state = Nearest.unknown(points, x_bD.device)
    cluster_s = 3 * torch.arange(centres) + 1
    if known:  # a third of the points, a centre that is not among these for some, any of them for others
        own_q = torch.arange(0, points, 3)
        state.index_b[own_q] = torch.where(own_q % 2 == 0, cluster_s[own_q % centres], 0)
        state.best_b[own_q] = torch.where(own_q % 2 == 0, true_bs[own_q, own_q % centres], 0.3)
    known_b1 = torch.where(state.index_b == 0, state.best_b, -2.0)[:, None]
    compare_(state, x_bD, centres_sD, cluster_s, dtype=CODES, kernels=False, tile=tile)
    all_bs = torch.cat([known_b1, true_bs], dim=1)
    best_b, index_b = all_bs.max(1)
    assert torch.equal(state.index_b, torch.cat([torch.tensor([0]), cluster_s])[index_b])
    torch.testing.assert_close(state.best_b, best_b, rtol=0, atol=1e-12)
    next_b = F.pad(all_bs, (0, 1), value=-2.0).topk(2).values[:, 1]
    has_b = next_b > -2
    torch.testing.assert_close(state.second_b[has_b].double(), next_b[has_b], rtol=0, atol=4e-6)
    assert (state.second_b[~has_b] == float("-inf")).all()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_points_are_coded_when_they_are_asked_for(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd_codes, "_KEPT_BYTES", kept_bytes)
    x_PD = unit(252, 123, seed=1)
    codes = PointCodes(UnitRows(TensorRows(x_PD)), always=False)
    whole = code_points(Rotation(123).turned(x_PD))
    for point_b in (torch.arange(40), torch.arange(20, 252, 3), torch.arange(252)):
        found = codes.of_points(point_b, x_PD[point_b])
        assert torch.equal(found.code_bE, whole.code_bE[point_b])
        assert torch.equal(found.step_b, whole.step_b[point_b])
    assert codes.pay(5000, 1024)
    assert codes.pay(5000, 200) == (kept_bytes > 0)
    assert not codes.pay(300, 5000)


def test_codes_are_given_up_where_candidates_are_too_many() -> None:
    """Points and centres that all but coincide: float32 has to do it, so codes only cost."""
    x_PD = F.normalize(unit(1, 96, seed=1) + 1e-3 * unit(200, 96, seed=2))
    codes, cluster_s = PointCodes(UnitRows(TensorRows(x_PD)), always=False), torch.arange(150)
    centres_sD, coded = x_PD[:150], codes.of_centres(x_PD[:150])
    assert codes.pay(5000, 150)
    for _ in range(8):
        state = Nearest.unknown(200, x_PD.device)
        codes.compare_(state, torch.arange(200), x_PD, centres_sD, coded, cluster_s)
        assert torch.equal(state.index_b[:150], cluster_s)
    assert not codes.pay(5000, 150)


def test_where_codes_can_be_and_pay() -> None:
    assert can_code(4096) == can_multiply()
    assert not can_code(4097)
    assert codes_pay(512, 2000)
    assert not codes_pay(64, 2000)
    assert not codes_pay(512, 100)
