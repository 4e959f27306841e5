"""Checks of the nearest-centre search against float64 truth, for any device: Triton's interpreter, CPUs and GPUs.

Legend: b points, s centres, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clustering.nearest.by_codes import nearest_by_codes_
from clustering.nearest.by_pairs import quieten
from clustering.nearest.codes import Rotation, code_centres, code_points
from clustering.nearest.nearest import NONE, Nearest, nearest_, tolerance, top_two

FP32, BF16, CODES = torch.float32, torch.bfloat16, torch.int8


class Case(NamedTuple):
    points: int
    centres: int
    D: int
    dtype: torch.dtype = FP32


CASES = [
    Case(1, 1, 7),
    Case(7, 123, 12),
    Case(123, 252, 507),
    Case(507, 7, 123),
    Case(600, 2100, 33),
    Case(40, 123, 60, BF16),
]


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def check_top_two(case: Case, device: str, kernel: bool) -> None:
    """The largest and the next of the true cosines of the rounded operands; hidden columns left out."""
    if kernel:
        from clustering.nearest.kernel_nearest import top_two as find
    else:
        find = top_two
    x_bD, centres_sD = unit(case.points, case.D, seed=1), unit(case.centres, case.D, seed=2)
    hidden_b = torch.arange(case.points) % (case.centres + 1) - 1
    true_bs = x_bD.to(case.dtype).double() @ centres_sD.to(case.dtype).double().T
    hides_b = hidden_b >= 0
    true_bs[hides_b, hidden_b[hides_b]] = float("-inf")
    first_b, column_b, second_b = (
        found.cpu() for found in find(x_bD.to(device), centres_sD.to(device, case.dtype), hidden_b.to(device))
    )
    expected_b2 = F.pad(true_bs, (0, 1), value=float("-inf")).topk(2).values
    torch.testing.assert_close(first_b.double(), expected_b2[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(second_b.double(), expected_b2[:, 1], rtol=0, atol=1e-6)
    some_b = first_b > float("-inf")
    at_b = true_bs.gather(1, column_b[:, None])[:, 0]
    torch.testing.assert_close(at_b[some_b], expected_b2[some_b, 0], rtol=0, atol=1e-6)


def four_of_each_part(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel for Hopper GPUs gives them, by plain torch: of the largest of each tile of 16, the four largest."""
    cosine_bs = x_bD.to(operand_sD.dtype).float() @ operand_sD.float().T
    hides_b = hidden_b >= 0
    cosine_bs[hides_b, hidden_b[hides_b]] = NONE
    parts = [(start, part) for start, part in zip(range(0, len(operand_sD), 16), cosine_bs.split(16, 1), strict=True)]
    largest_bT, column_bT = (
        torch.stack(found, dim=1)
        for found in zip(*((part.amax(1), part.argmax(1) + start) for start, part in parts), strict=True)
    )
    cosine_bL, place_bL = largest_bT.topk(min(4, len(parts)), dim=1)
    column_bL = column_bT.gather(1, place_bL)
    return cosine_bL, column_bL, cosine_bs.scatter(1, column_bL, NONE).amax(1)


def check_candidates(case: Case, device: str) -> None:
    """Candidates have the cosines that are said, the largest is one of them, and the others' largest is the rest's."""
    from clustering.nearest.kernel_nearest import candidates

    x_bD, centres_sD = unit(case.points, case.D, seed=1), unit(case.centres, case.D, seed=2)
    hidden_b = (torch.arange(case.points) * 31) % (case.centres + 1) - 1
    true_bs = x_bD.to(case.dtype).double() @ centres_sD.to(case.dtype).double().T
    hides_b = hidden_b >= 0
    true_bs[hides_b, hidden_b[hides_b]] = NONE
    found = candidates(x_bD.to(device), centres_sD.to(device, case.dtype), hidden_b.to(device))
    cosine_bL, column_bL, rest_b = (tensor.cpu() for tensor in found)
    some_bL, slack = cosine_bL > NONE, 4e-5
    said_bL = true_bs.gather(1, column_bL.where(some_bL, 0))
    torch.testing.assert_close(cosine_bL[some_bL].double(), said_bL[some_bL], rtol=0, atol=slack)
    torch.testing.assert_close(cosine_bL.amax(1).double(), true_bs.amax(1), rtol=0, atol=slack)
    row_q, place_q = some_bL.nonzero(as_tuple=True)
    assert len(torch.stack([row_q, column_bL[row_q, place_q]]).unique(dim=1).T) == len(row_q)
    true_bs[row_q, column_bL[row_q, place_q]] = NONE
    torch.testing.assert_close(rest_b.double(), true_bs.amax(1), rtol=0, atol=slack)


def exact(x_bD: Tensor, centres_sD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of pairs by a sum that rounds equal pairs equally, and the first of the largest."""
    cosine_bs = torch.stack([(x_bD.double() * centre_D.double()).sum(1) for centre_D in centres_sD], dim=1)
    return cosine_bs, cosine_bs.argmax(1)


def compare_(
    state: Nearest,
    x_bD: Tensor,
    centres_sD: Tensor,
    cluster_s: Tensor,
    *,
    dtype: torch.dtype,
    kernels: bool,
    tile: int = 16,
) -> None:
    """`nearest_`, or by codes for a dtype of int8."""
    if dtype != torch.int8:
        nearest_(state, x_bD, centres_sD, centres_sD.to(dtype), cluster_s, kernels=kernels)
        return
    quieten()
    turned = Rotation(x_bD.shape[1]).turned
    coded = code_centres(centres_sD, turned, tile=tile)
    nearest_by_codes_(state, x_bD, code_points(turned(x_bD)), centres_sD, coded, cluster_s)


def check_ties(device: str, kernels: bool, dtype: torch.dtype, D: int = 60) -> None:
    """Copies of centres, and centres one rounding apart: exact in any order of any tiles, the others all below."""
    base_sD = unit(40, D, seed=3)
    base_sD[10:20] = base_sD[0:10]
    base_sD[20:30] = base_sD[0:10] + 1e-7 * unit(10, D, seed=4)
    base_sD[35] = base_sD[5]
    x_bD = F.normalize(base_sD[torch.arange(123) % 40] + 0.1 * unit(123, D, seed=5))
    cosine_bs, index_b = exact(x_bD, base_sD)
    for width in (40, 7):
        for backwards in (False, True):
            state = Nearest.unknown(123, torch.device(device))
            lefts = range(0, 40, width)
            for left in reversed(lefts) if backwards else lefts:
                tile_sD = base_sD[left : left + width].to(device)
                cluster_s = torch.arange(left, left + len(tile_sD), device=device)
                compare_(state, x_bD.to(device), tile_sD, cluster_s, dtype=dtype, kernels=kernels)
            assert torch.equal(state.index_b.cpu(), index_b)
            torch.testing.assert_close(state.best_b.cpu(), cosine_bs.amax(1), rtol=0, atol=1e-14)
            others_b = cosine_bs.scatter(1, index_b[:, None], float("-inf")).amax(1)
            slack = tolerance(FP32 if dtype == CODES else dtype)
            assert (state.second_b.cpu() >= others_b - slack).all()
            assert (state.second_b.cpu() <= state.best_b.cpu() + slack).all()


def check_collapsed(device: str, kernels: bool, dtype: torch.dtype = FP32, D: int = 60) -> None:
    """Points and centres that all but coincide, copies among the centres: thinned out, and still exact."""
    base_D = unit(1, D, seed=6)
    centres_sD = F.normalize(base_D + 1e-5 * unit(150, D, seed=7))
    centres_sD[70:140] = centres_sD[0:70]
    centres_sD[145:] = centres_sD[144]
    x_bD = F.normalize(base_D + 1e-5 * unit(123, D, seed=8))
    cosine_bs, index_b = exact(x_bD, centres_sD)
    state = Nearest.unknown(123, torch.device(device))
    state.index_b[:] = torch.arange(123, device=device)  # their own; nearer ones are found, and the first of copies
    state.best_b.copy_(cosine_bs[torch.arange(123), torch.arange(123)])
    centres_sD = centres_sD.to(device)
    compare_(state, x_bD.to(device), centres_sD, torch.arange(150, device=device), dtype=dtype, kernels=kernels)
    assert torch.equal(state.index_b.cpu(), index_b)
    torch.testing.assert_close(state.best_b.cpu(), cosine_bs.amax(1), rtol=0, atol=1e-15)
    others_b = cosine_bs.scatter(1, index_b[:, None], NONE).amax(1)
    assert (state.second_b.cpu() >= others_b - tolerance(FP32 if dtype == CODES else dtype)).all()
