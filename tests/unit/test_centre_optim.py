"""Centre optimizers: torch.optim when all rows move, and nothing at all for rows that took no part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from partial_fc.optim import CentreAdamW, CentreSGD

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

PAIRS: dict[str, tuple[Make, Make]] = {
    "sgd": (
        lambda p: CentreSGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    ),
    "adamw": (
        lambda p: CentreAdamW(p, lr=0.01, betas=(0.9, 0.999), weight_decay=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.999), weight_decay=0.05),
    ),
}


def _start() -> nn.Parameter:
    return nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(3)))


def _sparse(rows: list[int], values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (7, 5), check_invariants=True)


@pytest.mark.parametrize("name", PAIRS)
def test_dense_gradient_equals_torch(name: str) -> None:
    ours, theirs = _start(), _start()
    optimizers = PAIRS[name][0]([ours]), PAIRS[name][1]([theirs])
    for _ in range(12):
        ours.grad = torch.randn(7, 5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_sparse_gradient_moves_just_its_rows_as_a_dense_optimizer_of_those_rows(name: str) -> None:
    ours = _start()
    rows = [0, 2, 6]
    theirs = nn.Parameter(ours.detach()[rows].clone())
    before = ours.detach().clone()
    mine, dense = PAIRS[name][0]([ours]), PAIRS[name][1]([theirs])
    for _ in range(9):
        grad = torch.randn(3, 5)
        ours.grad, theirs.grad = _sparse(rows, grad), grad
        mine.step()
        dense.step()
    torch.testing.assert_close(ours[rows], theirs, rtol=1e-5, atol=1e-6)
    untouched = [1, 3, 4, 5]
    assert torch.equal(ours[untouched], before[untouched])


@pytest.mark.parametrize("name", PAIRS)
def test_duplicate_rows_add_up_once(name: str) -> None:
    first, second = _start(), _start()
    one, two = PAIRS[name][0]([first]), PAIRS[name][0]([second])
    grad = torch.randn(2, 5)
    first.grad = _sparse([4, 4], grad)
    second.grad = _sparse([4], grad.sum(0, keepdim=True))
    one.step()
    two.step()
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", PAIRS)
def test_state_survives_a_save_bit_for_bit(name: str) -> None:
    def run(break_after: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        p = _start()
        optimizer = PAIRS[name][0]([p])
        for step in range(6):
            if step == break_after:
                state, p = optimizer.state_dict(), nn.Parameter(p.detach().clone())
                optimizer = PAIRS[name][0]([p])
                optimizer.load_state_dict(state)
            p.grad = _sparse([step, 6], torch.randn(2, 5, generator=generator))
            optimizer.step()
        return p.detach()

    assert torch.equal(run(None), run(3))
