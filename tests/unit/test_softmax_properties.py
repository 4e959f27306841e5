"""The streaming softmax of one process: equal to the dense reference whatever the shapes, exact slopes, and sums over
ten million classes that keep their digits.

Legend: N rows, D embedding size, C classes, K sub-centres a class, R = C K rows of the weight, S classes taking part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partial_fc.adaptive import AdaFaceTarget
from partial_fc.margins import Combined, TargetMargin, arcface, arcface_straight_through, cosface
from partial_fc.negatives import HardNegatives, InterclassFilter, Negatives
from partial_fc.products import add_product_
from partial_fc.softmax import streaming_margin_softmax
from partial_fc.tiles import SampledRows, SoftmaxSettings, shift_for


@dataclasses.dataclass
class Problem:
    x_ND: Tensor
    w_RD: Tensor
    target_N: Tensor
    margin_N: Tensor

    def loss(
        self,
        softmax: SoftmaxSettings,
        margin: TargetMargin,
        sampled: SampledRows | None = None,
        negatives: Negatives | None = None,
    ) -> Tensor:
        return streaming_margin_softmax(
            self.x_ND,
            self.w_RD,
            self.target_N,
            self.margin_N,
            softmax,
            None,
            margin=margin,
            sampled=sampled,
            negatives=negatives,
        )

    def loss_and_gradients(
        self,
        softmax: SoftmaxSettings,
        margin: TargetMargin,
        sampled: SampledRows | None = None,
        negatives: Negatives | None = None,
    ) -> list[Tensor]:
        """Loss of the rows that have a target; gradients of its weighted sum in embeddings, centres, margins."""
        loss_N = self.loss(softmax, margin, sampled, negatives)[self.target_N >= 0]
        weights_N = torch.linspace(0.5, 1.5, len(loss_N), dtype=loss_N.dtype)
        return [loss_N.detach(), *torch.autograd.grad(loss_N @ weights_N, (self.x_ND, self.w_RD, self.margin_N))]


def _problem(rows: int, dim: int, classes: int, subcentres: int = 1, seed: int = 0) -> Problem:
    """float64; every fifth row's target is another rank's."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    w_RD = draw(classes * subcentres, dim)
    target_N = torch.randint(0, classes, (rows,), generator=generator)
    x_ND = F.normalize(draw(rows, dim) + F.normalize(w_RD)[target_N * subcentres])
    target_N[4::5] = -1
    margin_N = 0.3 + 0.05 * draw(rows)
    return Problem(x_ND.requires_grad_(), w_RD.requires_grad_(), target_N, margin_N.requires_grad_())


def _sampled(problem: Problem, classes: int, padding: int, sure_share: float) -> SampledRows:
    """Every third class and those of the batch, and padding."""
    taken = set(range(0, classes, 3)) | {int(c) for c in problem.target_N if c >= 0}
    rows_S = torch.tensor([*sorted(taken), *[classes] * padding])
    return SampledRows(rows_S, int(sure_share * len(taken)), 0)


MARGINS: dict[str, TargetMargin] = {"arcface": arcface, "cosface": cosface, "combined": Combined(1.2, 0.1)}
NEGATIVES: dict[str, Negatives | None] = {"plain": None, "filter": InterclassFilter(0.2)}


def _assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, theirs.abs().max().item()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(2, 40),
    classes=st.integers(1, 200),
    chunk=st.integers(1, 50),
    subcentres=st.integers(1, 3),
    sampling=st.none() | st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0])),
    kept_bytes=st.sampled_from([0, 5000, 1 << 28]),
    margin=st.sampled_from(list(MARGINS)),
    negatives=st.sampled_from(list(NEGATIVES)),
    seed=st.integers(0, 2**31),
)
def test_streaming_equals_the_reference(
    rows: int,
    dim: int,
    classes: int,
    chunk: int,
    subcentres: int,
    sampling: tuple[int, float] | None,
    kept_bytes: int,
    margin: str,
    negatives: str,
    seed: int,
) -> None:
    problem = _problem(rows, dim, classes, subcentres, seed)
    sampled = None if sampling is None else _sampled(problem, classes, *sampling)
    softmax = SoftmaxSettings(
        scale=32.0, num_classes=classes + 1, subcentres=subcentres, chunk=chunk, kept_bytes=kept_bytes, impl="torch"
    )
    found, expected = (
        problem.loss_and_gradients(s, MARGINS[margin], sampled, NEGATIVES[negatives])
        for s in (softmax, dataclasses.replace(softmax, impl="reference"))
    )
    _assert_equal([t.to_dense() for t in found], expected)


@pytest.mark.parametrize("padding", [1, 6, 20])
@pytest.mark.parametrize("sure_share", [0.0, 1.0])
def test_padding_changes_nothing(padding: int, sure_share: float) -> None:
    problem = _problem(7, 12, 30, subcentres=2)
    softmax = SoftmaxSettings(scale=32.0, num_classes=30, subcentres=2, chunk=5, impl="torch")
    plain, padded = (
        problem.loss_and_gradients(softmax, arcface, _sampled(problem, 30, count, sure_share)) for count in (0, padding)
    )
    assert torch.equal(plain[2].coalesce().indices(), padded[2].coalesce().indices())
    _assert_equal([t.to_dense() for t in padded], [t.to_dense() for t in plain])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_lone_class_has_no_loss(impl: Literal["torch", "reference"]) -> None:
    for value in _problem(3, 4, 1).loss_and_gradients(SoftmaxSettings(scale=64.0, num_classes=1, impl=impl), arcface):
        assert (value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_added_to_nothing_of_what_was_there_does_not_read_it(dtype: torch.dtype) -> None:
    """Gradients are written to fresh memory, which may hold nan."""
    out = torch.full((2, 3), math.nan)
    add_product_(out, torch.ones(2, 5), torch.ones(5, 3), dtype, keep=0.0)
    assert torch.equal(out, torch.full((2, 3), 5.0))


def _hard(problem: Problem) -> HardNegatives:
    return HardNegatives(torch.tensor(0.3, dtype=torch.float64), torch.full_like(problem.margin_N, 0.1).detach())


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    "name", ["arcface", "cosface", "combined", "adaface", "filter", "hard negatives", "sub-centres", "sampled"]
)
def test_slopes_are_those_of_differences(name: str, kept_bytes: int) -> None:
    subcentres = 3 if name == "sub-centres" else 1
    problem = _problem(4, 3, 5, subcentres)
    problem.target_N.clamp_(0)
    softmax = SoftmaxSettings(
        scale=8.0, num_classes=5, subcentres=subcentres, chunk=2, kept_bytes=kept_bytes, sparse_gradient=False
    )
    sampled = SampledRows(torch.tensor(sorted({*problem.target_N.tolist(), 2})), 0, 0) if name == "sampled" else None
    quality_N = torch.tensor([-1.0, -0.4, 0.3, 1.0], dtype=torch.float64)
    margin = MARGINS.get(name, AdaFaceTarget(quality_N) if name == "adaface" else arcface)
    negatives = {"filter": InterclassFilter(0.2), "hard negatives": _hard(problem)}.get(name)
    if isinstance(negatives, HardNegatives):
        hard_CN = F.normalize(problem.w_RD) @ problem.x_ND.T > negatives.psi_N
        assert hard_CN.any()
        assert not hard_CN.all()

    def loss(x_ND: Tensor, w_RD: Tensor, margin_N: Tensor) -> Tensor:
        return Problem(x_ND, w_RD, problem.target_N, margin_N).loss(softmax, margin, sampled, negatives)

    assert torch.autograd.gradcheck(loss, (problem.x_ND, problem.w_RD, problem.margin_N))


def test_straight_through_has_the_slope_of_a_plain_cosine_and_none_in_the_margin() -> None:
    """Of the margin it has the value alone: its gradient is CosFace's, with the margin that gives the same logits."""
    problem = _problem(6, 5, 9)
    softmax = SoftmaxSettings(scale=16.0, num_classes=9)
    loss_N, x_ND, w_CD, margin_N = problem.loss_and_gradients(softmax, arcface_straight_through)
    unit_ND = F.normalize(problem.w_RD)[problem.target_N.clamp_min(0)]
    cosine_N = (problem.x_ND * unit_ND).sum(1).detach()
    psi_N = (cosine_N.arccos() + problem.margin_N).cos().detach()
    same = dataclasses.replace(problem, margin_N=(cosine_N - psi_N).requires_grad_())
    _assert_equal([loss_N, x_ND, w_CD], same.loss_and_gradients(softmax, cosface)[:3])
    assert (margin_N == 0).all()


@functools.lru_cache(maxsize=1)
def _centres(case: str, classes: int) -> tuple[Tensor, Tensor]:
    """Rows in the plane, (C, 2), near unit ones, the first number as the case says, and all but exact cosines with
    either axis, (C, 2) float64."""
    first_C = {
        "equal": torch.full((classes,), 0.6),
        "one above all": torch.full((classes,), -0.28),
        "opposite": torch.full((classes,), -1.0),
        "spread": torch.linspace(-1, 1, classes),
    }[case]
    if case == "one above all":
        first_C[classes // 2] = 1
    w_CD = torch.stack([first_C, (1 - first_C.square()).sqrt()], dim=1)
    return w_CD, F.normalize(w_CD.double())


def _assert_sum(case: str, classes: int, scale: float, chunk: int, bound: float) -> None:
    """Of two rows along the axes, whose targets are the first class and the last: the loss is near the truth, by the
    log of the sum over the other classes."""
    w_CD, cosine_CN = _centres(case, classes)
    target_N = torch.tensor([0, classes - 1])
    softmax = SoftmaxSettings(scale=scale, num_classes=classes, chunk=chunk)
    with torch.no_grad():
        found_N = Problem(torch.eye(2), w_CD, target_N, torch.zeros(2)).loss(softmax, cosface)
    for row, target in enumerate(target_N.tolist()):
        logit_C = scale * cosine_CN[:, row]
        own = logit_C[target].item()
        logit_C[target] = -math.inf
        total = logit_C.logsumexp(0)
        if total < -87 + shift_for(scale, classes):
            # docs/numerics.md: at the largest scale, beyond 100 degrees, exp() ends; rows so far from all are given up.
            assert scale == 128
            assert found_N[row] == 0
        else:
            error = abs(found_N[row].item() - F.softplus(total - own).item())
            assert error <= bound * max(abs(total.item()), scale)


@pytest.mark.parametrize("scale", [16.0, 64.0, 128.0])
@pytest.mark.parametrize("case", ["equal", "one above all", "opposite", "spread"])
@pytest.mark.parametrize("classes", [123, 100_003, 10_000_000])
def test_sums_over_ten_million_classes_keep_their_digits(classes: int, case: str, scale: float) -> None:
    _assert_sum(case, classes, scale, chunk=0, bound=1e-6)


def test_sums_over_many_small_tiles_do_too() -> None:
    """Sums of tiles are added in float64: in float32, T tiles could err by T x 2^-24."""
    _assert_sum("equal", 128 * 4000, 64.0, chunk=128, bound=1e-7)
