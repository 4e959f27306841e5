"""Products and sums of rows in float64: by torch, and by the kernels under Triton's interpreter; and they compile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clustering.nearest import float64_rows
from tests import float64_cases
from tests.float64_cases import SIZES
from tests.triton_process import Run, needs_triton

CPU = torch.device("cpu")


@pytest.mark.parametrize(("q", "D", "S"), SIZES)
def test_by_torch(q: int, D: int, S: int) -> None:
    off, differs = float64_cases.dots(q, D, "cpu", kernels=False)
    assert off < 1e-15
    assert differs == 0
    assert float64_cases.sums(q, D, S, "cpu", kernels=False) == (0, 0)


@pytest.mark.parametrize("D", [1, 7, 123, 512])
def test_folded_products_as_a_gpu_without_kernels_has_them(D: int) -> None:
    x_qD = float64_cases.rows(100, D, seed=5, device="cpu")
    row_q = torch.arange(100)
    folded_q = float64_rows.folded_dots(x_qD, None, x_qD, row_q.flip(0))
    torch.testing.assert_close(folded_q, float64_rows.row_dots(x_qD, None, x_qD, row_q.flip(0)), rtol=0, atol=1e-15)
    assert torch.equal(float64_rows.folded_dots(x_qD, row_q[3:4], x_qD, row_q.flip(0)[3:4]), folded_q[3:4])


@needs_triton
@pytest.mark.parametrize(("q", "D", "S"), SIZES)
def test_by_kernels(interpreter: Run, q: int, D: int, S: int) -> None:
    (off, differs), sums = interpreter(_by_kernels, q, D, S)
    assert off < 1e-15
    assert differs == 0
    assert sums == (0, 0)


def _by_kernels(q: int, D: int, S: int) -> tuple[float64_cases.Found, float64_cases.Found]:
    return float64_cases.dots(q, D, "cpu", kernels=True), float64_cases.sums(q, D, S, "cpu", kernels=True)


@needs_triton
def test_the_trial_is_passed(interpreter: Run) -> None:
    assert interpreter(_trial) == ""


def _trial() -> str:
    from clustering.nearest import kernel_float64_rows

    return float64_rows.trial(kernel_float64_rows, CPU)


def test_the_trial_names_what_differs() -> None:
    def dots(*arguments: Any) -> Tensor:
        return float64_rows.row_dots(*arguments) + 1e-9

    def nothing(*_: Any) -> None:
        return None

    kernels: Any = SimpleNamespace(row_dots=dots, move_=nothing)
    assert float64_rows.trial(kernels, CPU) == "a dot product is off by 1.0e-09, sums differ"


def _compile_all() -> int:
    """For a GPU, whether there is one or not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from clustering.nearest import kernel_float64_rows as kernels

    kinds = dict.fromkeys(("row", "other", "old", "new"), "*i64") | dict.fromkeys(("sums", "out"), "*fp64")
    kinds |= dict.fromkeys(("Q", "S", "x_stride", "a_stride", "b_stride"), "i32") | {"rounder": "fp32"}
    constants = {"D": 500, "ROWS": kernels._ROWS, "COLUMNS": kernels._COLUMNS}
    done = 0
    for kernel in (kernels._dots_kernel, kernels._move_kernel):
        names: list[str] = kernel.arg_names
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        for dtype in ("*fp32", "*fp64", "*i64"):
            signature = {name: "constexpr" if name in constants else kinds.get(name, dtype) for name in names}
            source = ASTSource(kernel, signature, values)
            made = compile_kernel(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": kernels._WARPS})
            assert made.asm["cubin"]
            done += 1
    return done


@needs_triton
def test_kernels_compile(compiler: Run) -> None:
    assert compiler(_compile_all) == 6
