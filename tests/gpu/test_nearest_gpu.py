"""The nearest centres on a GPU, by the kernel and by torch, against float64 truth."""

from __future__ import annotations

import pytest
import torch

from clustering.nearest import row_dots
from tests import nearest_cases
from tests.nearest_cases import BF16, CASES, FP32, Case, unit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("case", [*CASES, Case(4099, 10007, 512, BF16)], ids=str)
def test_the_two_largest_cosines(case: Case, kernel: bool) -> None:
    nearest_cases.check_top_two(case, "cuda", kernel)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kernel", [False, True])
def test_ties_go_to_the_smaller_cluster_in_any_order_of_tiles(kernel: bool, dtype: torch.dtype) -> None:
    nearest_cases.check_ties("cuda", kernel, dtype)


@pytest.mark.parametrize("kernel", [False, True])
def test_data_that_has_collapsed_is_told_apart_exactly(kernel: bool) -> None:
    nearest_cases.check_collapsed("cuda", kernel)


@pytest.mark.parametrize("D", [1, 7, 123, 512])
def test_a_dot_product_has_the_same_bits_among_others_as_alone(D: int) -> None:
    x_XD, row_q = unit(3000, D, seed=1).cuda(), torch.arange(3000, device="cuda")
    together_q = row_dots(x_XD, row_q, x_XD, row_q.flip(0))
    alone_q = [row_dots(x_XD, row_q[i : i + 1], x_XD, row_q.flip(0)[i : i + 1]) for i in range(0, 3000, 97)]
    assert torch.equal(together_q[::97], torch.cat(alone_q))
