"""The kernels of a step's rows on a GPU: what torch does there, in any run. Skipped without one."""

from __future__ import annotations

import warnings

import pytest
import torch

from clustering.step.choice import kernel_ops, step_ops
from clustering.step.plain import PLAIN
from clustering.step.trial import differences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("rows", "dim"), [(70, 40), (1, 7), (1024, 512), (1500, 130)])
def test_kernels_do_what_torch_does(rows: int, dim: int) -> None:
    found = differences(kernel_ops(), PLAIN, torch.device("cuda"), rows=rows, dim=dim, seed=rows)
    assert max(found.values()) < 5e-6, found


def test_with_bank_weight_and_operands_of_bf16() -> None:
    found = differences(kernel_ops(), PLAIN, torch.device("cuda"), rows=300, dim=512, seed=1, dtype=torch.bfloat16)
    assert found.pop("others") < 2**-7, "sums of products of rounded operands"
    assert max(found.values()) <= 2**-9, found  # a step of bf16 at a number below 1/2


def test_two_runs_have_the_same_bits() -> None:
    for seed in range(20):
        found = differences(kernel_ops(), kernel_ops(), torch.device("cuda"), rows=1024, dim=512, seed=seed)
        assert max(found.values()) == 0, found


def test_they_run_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_ops(torch.zeros(1, 512, device="cuda")) is not PLAIN
