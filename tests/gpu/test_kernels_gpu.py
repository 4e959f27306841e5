"""The kernels on a GPU, against float64 truth and themselves. Skipped without one."""

from __future__ import annotations

import dataclasses
import functools
import time

import pytest
import torch

from partial_fc import kernels
from tests import kernel_cases
from tests.kernel_problems import BF16, Case, problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = [
    Case(1, 7, 1),
    Case(7, 12, 7),
    Case(123, 252, 507, True, "filter"),
    Case(507, 123, 4099, True, "hard"),
    Case(507, 512, 4099),
    Case(507, 252, 4099, True, "plain", BF16),
    Case(1024, 512, 4099, False, "plain", BF16),
    Case(1024, 512, 4099, True, "plain", BF16, BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_dense_formula(case: Case) -> None:
    kernel_cases.check_forward(case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_that_of_the_dense_formula(case: Case) -> None:
    kernel_cases.check_gradient(case, "cuda")


@pytest.mark.parametrize("on_sphere", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16])
def test_update_is_the_optimizers_step(weight_dtype: torch.dtype, kind: str, on_sphere: bool) -> None:
    kernel_cases.check_update(Case(123, 252, 507, True, weight_dtype=weight_dtype), "cuda", kind, on_sphere)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16])
def test_a_step_that_is_skipped_changes_nothing(weight_dtype: torch.dtype, kind: str) -> None:
    kernel_cases.check_skip(Case(123, 252, 507, True, weight_dtype=weight_dtype), "cuda", kind, False)


@pytest.mark.parametrize(
    "check",
    [
        kernel_cases.check_two_batches,
        kernel_cases.check_lots,
        kernel_cases.check_chunks,
        kernel_cases.check_empty,
    ],
)
def test_as_under_the_interpreter(check: kernel_cases.Check) -> None:
    check("cuda")


def test_two_runs_have_the_same_bits() -> None:
    made = problem(Case(1000, 512, 70001, True, "plain", BF16), "cuda")
    runs = [
        (*kernels.forward(made.terms, want_u=True), kernels.gradient([made.batch], made.terms.rows_S)) for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_rows_lie_beyond_two_billion_numbers() -> None:
    """Offsets beyond 32 bits: the last rows of a large weight give what they give as a weight of their own."""
    made = problem(Case(64, 512, 300, weight_dtype=BF16), "cuda")
    C, own = (1 << 31) // 512 + 1000, made.terms.w_CD
    w_CD = torch.zeros(C, 512, dtype=BF16, device="cuda")
    w_CD[-300:] = own
    target_N = torch.where(made.terms.target_N >= 0, made.terms.target_N + C - 300, -1)
    rows_S = torch.arange(C - 300, C, device="cuda")
    large = dataclasses.replace(made.terms, w_CD=w_CD, target_N=target_N, rows_S=rows_S)
    for one, other in zip(kernels.forward(made.terms, want_u=True), kernels.forward(large, want_u=True), strict=True):
        assert one is not None
        assert torch.equal(one, other)
    states = [torch.zeros_like(own), torch.zeros_like(w_CD)]
    for terms, velocity_CD in zip((made.terms, large), states, strict=True):
        batch = dataclasses.replace(made.batch, terms=terms)
        rule = kernels.Sgd(velocity_CD=velocity_CD, lr=0.1, momentum=0.9)
        kernels.update([batch], terms.rows_S, rule, first_row=0 if terms is large else C - 300)
    assert torch.equal(own, w_CD[-300:])
    assert torch.equal(states[0], states[1][-300:])
    assert not w_CD[:-300].any()


def test_a_slow_host_does_not_make_a_kernel_slower() -> None:
    from partial_fc.kernel_tuning import timed

    def work(seconds: float) -> None:
        time.sleep(seconds)
        torch.cuda._sleep(1_000_000)

    device = torch.device("cuda", 0)
    alone, behind = (timed(functools.partial(work, seconds), device) for seconds in (0, 0.001))
    assert behind < 1.3 * alone
