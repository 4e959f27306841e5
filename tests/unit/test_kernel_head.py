"""The head and its optimizers by the Triton kernels, under Triton's interpreter: what the torch implementation does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from partial_fc.choice import KernelFallbackWarning, runs_kernels
from partial_fc.deferred import deferred
from tests.triton_process import Run, fresh_process, needs_triton
from tests.unit.test_fused_optim import ADAMW, SGD, _batch, _differ, _head, _train

pytestmark = needs_triton
MAKE = {"sgd": SGD, "adamw": ADAMW}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from fresh_process(True, tmp_path_factory.mktemp("triton"))


def _compare(name: str, settings: dict[str, Any], accumulation: int, aligned: bool, on_sphere: bool) -> float:
    found = []
    for impl in ("triton", "torch"):
        head = _head(impl=impl, **settings)
        optimizer = MAKE[name](head.parameters(), on_sphere=on_sphere)
        x_BD, labels_B = _batch(0)
        head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
        (gradient,) = deferred(head.weight) or []
        assert gradient.by_kernels == (impl == "triton")
        optimizer.zero_grad()
        found.append(_train(head, optimizer, accumulation=accumulation, aligned=aligned).float())
    return _differ(*found)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    ("settings", "accumulation", "aligned", "on_sphere"),
    [
        ({}, 1, False, False),
        ({"sample_rate": 0.2}, 2, True, False),
        ({"interclass_filter": 0.2}, 1, True, True),
        ({"loss": "curricularface", "sample_rate": 0.3}, 1, False, False),
    ],
)
def test_training_by_kernels_is_training_by_torch(
    interpreter: Run, name: str, settings: dict[str, Any], accumulation: int, aligned: bool, on_sphere: bool
) -> None:
    assert interpreter(_compare, name, settings, accumulation, aligned, on_sphere) < 1e-4


def test_bf16_centres_too(interpreter: Run) -> None:
    """The lots are the same; sums in another order may tip a few numbers to the other neighbour."""
    assert interpreter(_compare, "sgd", {"centre_dtype": "bf16", "sample_rate": 0.3}, 1, False, False) < 2e-2


def _plain_gradients(impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    head = _head(impl=impl, sample_rate=0.3)
    x_BD, labels_B = _batch(0)
    head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
    assert x_BD.grad is not None
    assert head.weight.grad is not None
    return x_BD.grad, head.weight.grad.to_dense()


def test_gradients_for_other_optimizers(interpreter: Run) -> None:
    for found, truth in zip(interpreter(_plain_gradients, "triton"), _plain_gradients("torch"), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def test_a_fallback_says_why_once() -> None:
    x_ND, w_CD = torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    with pytest.warns(KernelFallbackWarning, match="cannot run: .*float64"):
        assert not runs_kernels("triton", x_ND, w_CD, subcentres=1, negatives=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_kernels("triton", x_ND, w_CD, subcentres=1, negatives=None)
        assert not runs_kernels("auto", x_ND, w_CD, subcentres=1, negatives=None), "on CPUs nobody asked for them"
