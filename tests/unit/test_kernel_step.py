"""The kernels of a step's rows do what the plain functions do, under Triton's interpreter; and they compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clustering.step import plain as step_plain
from clustering.step.choice import kernel_ops, step_ops, trial
from clustering.step.plain import PLAIN, StepOps
from clustering.step.trial import differences
from tests.triton_process import Run, needs_triton

CPU = torch.device("cpu")
SIZES = [(70, 40), (1, 7), (200, 16), (133, 130)]


def _found(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return differences(kernel_ops(), PLAIN, CPU, rows=rows, dim=dim, seed=rows, dtype=dtype)


@needs_triton
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_kernels_do_what_torch_does(interpreter: Run, rows: int, dim: int) -> None:
    found = interpreter(_found, rows, dim)
    assert len(found) == 9
    assert max(found.values()) < 2e-6, found


@needs_triton
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_sums_over_the_others_are_near_with_rounded_operands(interpreter: Run, rows: int, dim: int) -> None:
    found = interpreter(_found, rows, dim, torch.bfloat16)
    assert 0 < found["others"] < 2**-7, found


@needs_triton
def test_the_trial_is_passed(interpreter: Run) -> None:
    assert interpreter(_trial) == ""


def _trial() -> str:
    return trial(kernel_ops(), CPU, rows=140)


def test_the_trial_names_what_differs() -> None:
    def turned(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        own_N, u_ND = step_plain.own(*arguments)
        return own_N, -u_ND

    def silent(*_: Any) -> None:
        return None

    assert trial(PLAIN, CPU) == ""
    assert trial(StepOps(own=turned), CPU).startswith("own is off by")
    said = trial(StepOps(move=silent, store=silent), CPU)
    assert "move is off" in said
    assert "store with momentum is off" in said


def test_plain_functions_run_on_cpus() -> None:
    assert step_ops(torch.zeros(1, 8)) is PLAIN


def _compile_all() -> list[str]:
    """For a GPU, whether there is one or not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from clustering.step import kernel_losses, kernel_step

    kinds = dict.fromkeys(("ids", "labels", "cluster", "class_of", "owned", "order", "count", "row"), "*i64")
    kinds |= dict.fromkeys(("slots", "code"), "*i32") | dict.fromkeys(("seen", "suspect", "taken", "distinct"), "*u8")
    kinds |= dict.fromkeys(("samples", "N", "S", "R", "first_cluster", "first_class"), "i32")
    kinds |= dict.fromkeys(("momentum", "new", "temperature"), "fp32")
    constants = {"D": 500, "E": 512, "BLOCK": 128, "M": 3, "MOMENTUM": True}
    done = []
    for kernel in (
        kernel_step._store_kernel,
        kernel_step._codes_kernel,
        kernel_step._move_kernel,
        kernel_losses._own_kernel,
        kernel_losses._join_kernel,
        kernel_losses._align_kernel,
    ):
        names: list[str] = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
        signature |= {"bank": "*bf16"} if "bank" in names else {}
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        for weight in {"*fp32", "*bf16"} if "w" in names else {"*fp32"}:
            signature |= {"w": weight} if "w" in names else {}
            source = ASTSource(kernel, signature, values)
            made = compile_kernel(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
            assert made.asm["cubin"]
            done.append(made.metadata.name)
    return done


@needs_triton
def test_kernels_compile(compiler: Run) -> None:
    assert len(compiler(_compile_all)) == 7
