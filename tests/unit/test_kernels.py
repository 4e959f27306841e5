"""The kernels: against float64 truth under Triton's interpreter, compiled for GPUs that are not here, and refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from partial_fc.kernels import MAX_DIM, why_not
from tests import kernel_cases
from tests.kernel_problems import BF16, Case
from tests.triton_process import Run, needs_triton

CASES = [
    Case(1, 7, 1),
    Case(7, 12, 7),
    Case(64, 252, 123, True, "filter"),
    Case(123, 60, 252, True, "hard"),
    Case(33, 512, 123),
    Case(40, 123, 150, True, "plain", BF16),
    Case(33, 252, 60, False, "plain", BF16, BF16),
]
UPDATES = [
    Case(7, 12, 7),
    Case(20, 123, 60, True, "hard"),
    Case(20, 252, 50, True, "filter", weight_dtype=BF16),
]


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_dense_formula(interpreter: Run, case: Case) -> None:
    interpreter(kernel_cases.check_forward, case, "cpu")


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_that_of_the_dense_formula(interpreter: Run, case: Case) -> None:
    interpreter(kernel_cases.check_gradient, case, "cpu")


@needs_triton
def test_gradients_of_two_batches_add_up(interpreter: Run) -> None:
    interpreter(kernel_cases.check_two_batches, "cpu")


@needs_triton
@pytest.mark.parametrize("on_sphere", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_update_is_the_optimizers_step(interpreter: Run, case: Case, kind: str, on_sphere: bool) -> None:
    interpreter(kernel_cases.check_update, case, "cpu", kind, on_sphere)


@needs_triton
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_a_step_that_is_skipped_changes_nothing(interpreter: Run, case: Case, kind: str) -> None:
    interpreter(kernel_cases.check_skip, case, "cpu", kind, case.weight_dtype == BF16)


@needs_triton
def test_stochastic_rounding_has_the_bits_of_the_plain_version(interpreter: Run) -> None:
    interpreter(kernel_cases.check_lots, "cpu")


@needs_triton
def test_classes_may_come_in_several_chunks(interpreter: Run) -> None:
    interpreter(kernel_cases.check_chunks, "cpu")


@needs_triton
def test_a_batch_or_a_shard_may_be_empty(interpreter: Run) -> None:
    interpreter(kernel_cases.check_empty, "cpu")


def _compile_all(capability: int, dim: int) -> int:
    """Compile every kernel for a GPU of that capability, here or not; the largest shared memory, in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from partial_fc import kernel_forward, kernel_gradient, kernel_parts, kernel_update
    from partial_fc.kernel_tuning import launches

    types = dict.fromkeys(("rows", "target"), "*i64")
    types |= dict.fromkeys(("x", "unit", "w", "first_state", "second_state"), "*bf16")
    types |= dict.fromkeys(("psi", "t", "other", "u", "by", "at_target", "sums", "grad", "row_steps", "skip"), "*fp32")
    types |= dict.fromkeys(("N", "S", "C", "start", "stop", "split_size", "key", "first_row"), "i32")

    def shared(kernel: Any, constants: dict[str, Any], **options: int) -> int:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        found: int = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
        return found

    rows = {"D": 123, "E": 128, "BLOCK": kernel_parts.ROW_BLOCK}
    shared(kernel_parts._unit_kernel, rows | {"PRODUCT": "bfloat16"}, num_warps=kernel_parts.ROW_WARPS)
    step = rows | {"RULE": "adamw", "ON_SPHERE": True, "grad": None}
    shared(kernel_update._step_kernel, step, num_warps=kernel_parts.ROW_WARPS)
    launch = launches(dim, BF16)[0]
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    common = {"PRODUCT": "bfloat16", "E": dim, "NEGATIVES": "hard"}
    forward = common | {"BLOCK_N": launch.kept, "BLOCK_C": launch.walked}
    gradient = common | {"BLOCK_C": launch.kept, "BLOCK_N": launch.walked, "ADD": True}
    return max(
        shared(kernel_forward._forward_kernel, forward, **options),
        shared(kernel_gradient._gradient_kernel, gradient, **options),
    )


@needs_triton
def test_kernels_compile(compiler: Run) -> None:
    """Triton's interpreter lets types pass that its compiler does not. An H100 has 227 kB of shared memory."""
    assert compiler(_compile_all, 90, 512) <= 227 * 1024


@needs_triton
def test_a_trial_times_the_gpu_and_not_the_host(compiler: Run) -> None:
    compiler(kernel_cases.check_timing)


@needs_triton
def test_the_fastest_launch_that_fits_is_kept(compiler: Run) -> None:
    compiler(kernel_cases.check_tuning, "cpu")


def test_why_not_says_what_is_missing() -> None:
    x_ND, w_CD = torch.ones(2, 8), torch.ones(3, 8)
    wide = torch.ones(1, MAX_DIM + 1)
    if why_not(x_ND, w_CD) != "triton is not installed":
        assert "CPU" in why_not(x_ND, w_CD)
        assert why_not(x_ND, w_CD, subcentres=2) == "sub-centres"
        assert why_not(x_ND.double(), w_CD) == "embeddings of float64 and centres of float32"
        assert why_not(wide, wide) == f"D = {MAX_DIM + 1} is more than {MAX_DIM}"
        assert "one after the other" in why_not(x_ND, torch.ones(8, 3).T)


def test_the_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, partial_fc; from partial_fc.kernels import why_not; "
        "print(why_not(torch.ones(1, 1), torch.ones(1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "triton is not installed\n"
