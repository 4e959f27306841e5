"""Every loss of the sharded head against the dense one in float64: loss and gradients, any ranks, rates and shapes.

Legend: N rows of the global batch, D embedding size, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partial_fc import collectives
from tests.dist.head_cases import (
    LOSSES,
    SCALE,
    Case,
    assert_near,
    problem,
    relative,
    sharded,
    truth,
    turned,
    whole,
)
from tests.ranks import WORLD_SIZES, RankPool

RATES = (1.0, 0.3)
BOUND = 2e-6
"""Relative error of a loss and, in the Frobenius norm, of a gradient."""
SHAPES = [  # rows on one rank, on several; embedding size; classes. Odd classes leave ranks with unequal shards
    (7, 8, 252, 123),
    (123, 124, 7, 4099),
    (1, 4, 123, 7),
    (7, 252, 507, 507),
    (123, 12, 123, 252),
    (1, 4, 4099, 123),
    (123, 252, 252, 4099),
]
"""Each loss meets another pair of them, at either rate; together they meet all."""


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_dense_loss_in_float64(ranks: RankPool, loss: str, rate: float, world_size: int) -> None:
    one, several, dim, classes = SHAPES[(2 * list(LOSSES).index(loss) + RATES.index(rate)) % len(SHAPES)]
    case = Case(rows=one if world_size == 1 else several, dim=dim, classes=classes, loss=loss, rate=rate)
    assert_near(whole(ranks.run(world_size, sharded, case)), truth(case), BOUND)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_untrained_and_learnt_embeddings(ranks: RankPool, loss: str, pull: float, world_size: int) -> None:
    case = Case(rows=12, dim=252, classes=507, loss=loss, pull=pull)
    assert_near(whole(ranks.run(world_size, sharded, case)), truth(case), BOUND)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rate", RATES)
def test_a_rank_without_classes(ranks: RankPool, rate: float, loss: str) -> None:
    case = Case(rows=4, dim=7, classes=3, loss=loss, rate=rate)
    assert_near(whole(ranks.run(4, sharded, case)), truth(case), BOUND)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_embeddings_of_one_number(ranks: RankPool, world_size: int) -> None:
    """Cosines are 1 or -1, and on that sphere centres have nowhere to go. ArcFace's slope is infinite there."""
    case = Case(rows=12, dim=1, classes=7, loss="cosface")
    found, exact = whole(ranks.run(world_size, sharded, case)), truth(case)
    assert found.loss == pytest.approx(exact.loss, rel=BOUND)
    assert relative(found.x_ND, exact.x_ND) <= BOUND
    assert (found.w_RD * problem(case)[2]).abs().max() <= SCALE * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("loss", "rate"), [("arcface", 1.0), ("combined", 0.3), ("curricularface", 0.3)])
def test_the_reference_in_the_package(ranks: RankPool, loss: str, rate: float, world_size: int) -> None:
    case = Case(rows=12, dim=123, classes=507, loss=loss, rate=rate, impl="reference")
    assert_near(whole(ranks.run(world_size, sharded, case)), truth(case), BOUND)


class _Bf16Product(torch.autograd.Function):
    """a @ b.T, operands rounded to bf16 in forward and backward, summed in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.bfloat16().float(), b.bfloat16().float()
        ctx.save_for_backward(a, b)
        return a @ b.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad.bfloat16().float()
        return grad @ b, grad.T @ a


def _dense_bf16(case: Case) -> tuple[Tensor, Tensor]:
    """Both gradients of the dense float32 head whose products have bf16 operands."""
    x_ND, _, w_CD, labels_N, margins_C = problem(case)
    x_ND, w_CD = x_ND.clone().requires_grad_(), w_CD.clone().requires_grad_()
    known_N = labels_N >= 0
    y_N1 = labels_N[known_N, None]
    cosine_NC: Tensor = _Bf16Product.apply(x_ND[known_N], F.normalize(w_CD))
    psi_N1 = turned(cosine_NC.gather(1, y_N1), margins_C[y_N1])
    F.cross_entropy(SCALE * cosine_NC.scatter(1, y_N1, psi_N1), y_N1[:, 0]).backward()
    assert x_ND.grad is not None
    assert w_CD.grad is not None
    return x_ND.grad, w_CD.grad


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_bf16_products_err_no_more_than_a_dense_head_with_bf16_operands(
    ranks: RankPool, pull: float, world_size: int
) -> None:
    """Over four problems: of one alone, either may be a quarter better by the luck of the rounding."""
    ours, dense = torch.zeros(2), torch.zeros(2)  # squares, of embeddings' and of centres' gradient
    for rows, dim, classes in ((124, 123, 507), (252, 252, 507), (252, 123, 4099), (124, 64, 999)):
        case = Case(rows=rows, dim=dim, classes=classes, pull=pull, products=torch.bfloat16)
        found, exact = whole(ranks.run(world_size, sharded, case)), truth(case)
        dense_x_ND, dense_w_CD = _dense_bf16(case)
        ours += torch.tensor([relative(found.x_ND, exact.x_ND), relative(found.w_RD, exact.w_RD)]).square()
        dense += torch.tensor([relative(dense_x_ND, exact.x_ND), relative(dense_w_CD, exact.w_RD)]).square()
    assert (ours.sqrt() > 1e-4).all(), "operands were rounded at all"
    assert (ours.sqrt() <= 1.1 * dense.sqrt()).all()


WIRE_CASE = Case(rows=12, dim=123, classes=507, wire="bf16")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("loss", ["arcface", "magface"])
def test_a_bf16_wire_rounds_the_embeddings_gradient_alone(ranks: RankPool, loss: str, world_size: int) -> None:
    """These embeddings are bf16 numbers. Each rank's part of their gradient is rounded to 8 bits, their sum is not."""
    case = dataclasses.replace(WIRE_CASE, loss=loss)
    found, exact = whole(ranks.run(world_size, sharded, case)), truth(case)
    error = relative(found.x_ND, exact.x_ND)
    assert 2**-12 < error < 2**-8
    assert torch.equal(found.x_ND.bfloat16().float(), found.x_ND) == (world_size == 1)
    assert_near(found._replace(x_ND=exact.x_ND), exact, BOUND)


def _bytes_sent(group: dist.ProcessGroup, case: Case) -> dict[str, int]:
    """Bytes of the whole batch that each of the head's own collectives is given or gives."""
    with (
        mock.patch.object(collectives, "_all_gather", wraps=collectives._all_gather) as gather,
        mock.patch.object(collectives, "_reduce_scatter", wraps=collectives._reduce_scatter) as scatter,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        sharded(group, case)
    assert gather.call_count == scatter.call_count + exchange.call_count == reduce.call_count == 1
    (backward,) = scatter.call_args_list + exchange.call_args_list
    return {"forward": gather.call_args.args[0].nbytes, "backward": backward.args[1].nbytes}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_bf16_wire_carries_half_the_bytes(ranks: RankPool, world_size: int) -> None:
    """Beside the embedding's D numbers a row has its length, label and sample id; its gradient has the length's."""
    N, D = WIRE_CASE.rows, WIRE_CASE.dim
    for wire, size in (("fp32", 4), ("bf16", 2)):
        case = dataclasses.replace(WIRE_CASE, wire=wire)
        for sent in ranks.run(world_size, _bytes_sent, case):
            assert sent == {"forward": N * (size * D + 4 + 8 + 8), "backward": N * (size * D + 4)}
