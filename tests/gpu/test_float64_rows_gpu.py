"""Products and sums of rows in float64 on a GPU, by the kernels and by torch. Skipped without one."""

from __future__ import annotations

import warnings

import pytest
import torch

from clustering.nearest import float64_rows
from tests import float64_cases
from tests.float64_cases import SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("q", "D", "S"), [*SIZES, (3000, 512, 50), (3000, 130, 2)])
def test_by_kernels(q: int, D: int, S: int) -> None:
    off, differs = float64_cases.dots(q, D, "cuda", kernels=True)
    assert off < 1e-15
    assert differs == 0
    assert float64_cases.sums(q, D, S, "cuda", kernels=True) == (0, 0)


def test_they_run_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float64_rows._kernels(torch.device("cuda", 0)) is not None


def test_by_torch_alike() -> None:
    x_qD = float64_cases.rows(3000, 123, seed=1, device="cuda")
    row_q = torch.arange(3000, device="cuda")
    folded_q = float64_rows.folded_dots(x_qD, None, x_qD, row_q.flip(0))
    torch.testing.assert_close(folded_q, float64_rows.row_dots(x_qD, None, x_qD, row_q.flip(0)), rtol=0, atol=1e-15)
    alone_q = [float64_rows.folded_dots(x_qD, row_q[i : i + 1], x_qD, row_q.flip(0)[i : i + 1]) for i in (0, 7, 2999)]
    assert torch.equal(torch.cat(alone_q), folded_q[[0, 7, 2999]])
