"""The baseline of the benchmarks computes what the peer's head computes, and what ours does with its gradient.

Legend: B rows, D embedding size, C classes, S of them sampled.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.heads.partial_fc_style import partial_fc_style_loss, sampled_rows
from configs.schema import HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "partial_fc_v2_world1.json"
MARGIN, SCALE = (
    0.5,
    16.0,
)  # 64, the peer's own, is in the recorded cases: there its losses end at -log(1e-30), ours do not


def _problem(classes: int, batch: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows somewhat near their centres: neither certain of their class, where theirs loses digits, nor far from it."""
    g = torch.Generator().manual_seed(classes)
    w_CD = torch.randn(classes, dim, generator=g) * 0.1
    labels_B = torch.randint(0, classes, (batch,), generator=g)
    x_BD = torch.nn.functional.normalize(torch.randn(batch, dim, generator=g) + 4 * w_CD[labels_B])
    return x_BD, w_CD, labels_B


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("classes", "batch", "dim"), [(2, 1, 7), (123, 7, 16), (507, 31, 64), (4099, 64, 123)])
def test_equals_ours_with_the_straight_through_gradient(classes: int, batch: int, dim: int) -> None:
    x_BD, w_CD, labels_B = _problem(classes, batch, dim)
    results = []
    for number in range(2):
        x, w = x_BD.clone().requires_grad_(), torch.nn.Parameter(w_CD.clone())
        if number:
            loss = partial_fc_style_loss(x, w, labels_B, margin=MARGIN, scale=SCALE)
        else:
            config = HeadConfig(margin=MARGIN, scale=SCALE, straight_through=True)
            head = PartialFCHead(num_classes=classes, embedding_size=dim, config=config, group=None, seed=0)
            head.weight = w
            loss = head(gather_batch(x, labels_B, torch.arange(batch), None), step=0)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        # Theirs normalises the embeddings again: what lies along them has no effect on unit rows.
        tangent = x.grad - (x.grad * x_BD).sum(1, keepdim=True) * x_BD
        results.append((loss.detach(), tangent, w.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        assert _relative(found, expected) < 1e-5


def test_equals_what_was_recorded_of_the_peer() -> None:
    recorded = json.loads(VECTORS.read_text())
    batch, dim, classes = (recorded[name] for name in ("batch", "dim", "classes"))
    g = np.random.default_rng(21 + recorded["seed"])  # by the rule in the fixture's README
    w_CD = 0.05 * g.standard_normal((classes, dim))
    x_BD = g.standard_normal((1, batch, dim))[0]
    labels_B = g.integers(0, classes, (1, batch))[0]
    x_BD += 24 * w_CD[labels_B]
    cases = [case for case in recorded["cases"] if case["m3"] == 0 and case["filter"] == 0]
    assert cases
    for case in cases:
        x, w = (torch.from_numpy(a).float().requires_grad_() for a in (x_BD, w_CD))
        loss = partial_fc_style_loss(x, w, torch.from_numpy(labels_B), margin=case["m2"], scale=case["s"])
        loss.backward()
        (theirs,) = case["ranks"]
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
        for grad, expected in ((x.grad, theirs["grad_x"]), (w.grad, theirs["grad_w"])):
            assert grad is not None
            assert _relative(grad, torch.tensor(expected)) < 1e-5


@pytest.mark.parametrize(("rate", "expected"), [(0.1, 50), (0.5, 253), (0.001, 3)])
def test_sampled_rows_hold_the_batch_first(rate: float, expected: int) -> None:
    torch.manual_seed(0)
    labels_B = torch.tensor([506, 0, 123, 0])
    rows_S = sampled_rows(labels_B, 507, rate)
    assert len(rows_S) == expected
    assert set(labels_B.tolist()) <= set(rows_S.tolist())
    assert (rows_S.diff() > 0).all()


def test_sampled_loss_is_the_loss_over_the_sampled_rows() -> None:
    x_BD, w_CD, labels_B = _problem(507, 31, 16)
    torch.manual_seed(3)
    rows_S = sampled_rows(labels_B, 507, 0.3)
    torch.manual_seed(3)
    w = w_CD.clone().requires_grad_()
    loss = partial_fc_style_loss(x_BD, w, labels_B, margin=MARGIN, scale=SCALE, sample_rate=0.3)
    alone = partial_fc_style_loss(x_BD, w_CD[rows_S], torch.searchsorted(rows_S, labels_B), margin=MARGIN, scale=SCALE)
    assert loss.item() == alone.item()
    loss.backward()
    assert w.grad is not None
    assert not w.grad.is_sparse  # as large as the shard: what the baseline is about
    untouched = torch.ones(507, dtype=torch.bool).index_fill(0, rows_S, value=False)
    assert w.grad[untouched].abs().max() == 0
