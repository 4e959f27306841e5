"""Gradients that the optimizer makes itself are those of .grad; catching up equals a dense optimizer; spheres and
errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.head import HeadConfig
from partial_fc.deferred import deferred
from partial_fc.head import PartialFCHead, initial_centres
from partial_fc.optim import CentreAdamW, CentreSGD
from partial_fc.work import CentreGradientError

CLASSES, DIM, ROWS = 203, 12, 16
Make = Callable[..., torch.optim.Optimizer]
SGD: Make = lambda p, **kw: CentreSGD(p, lr=0.3, momentum=0.9, weight_decay=0.01, **kw)  # noqa: E731
ADAMW: Make = lambda p, **kw: CentreAdamW(p, lr=0.02, betas=(0.9, 0.99), weight_decay=0.05, **kw)  # noqa: E731

SETTINGS: dict[str, dict[str, Any]] = {
    "all classes": {},
    "sampled": {"sample_rate": 0.2},
    "hardly any sampled": {"sample_rate": 0.001},
    "sub-centres": {"subcentres": 3},
    "sub-centres, sampled": {"subcentres": 2, "sample_rate": 0.3},
    "filter, sampled": {"interclass_filter": 0.2, "sample_rate": 0.3},
    "curricularface": {"loss": "curricularface"},
}


def _head(*, kept_bytes: int = 0, **settings: Any) -> PartialFCHead:
    head = PartialFCHead(
        num_classes=CLASSES, embedding_size=DIM, config=HeadConfig(scale=16.0, **settings), group=None, seed=4
    )
    head.settings = dataclasses.replace(head.settings, chunk=50, kept_bytes=kept_bytes)
    return head


def _batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x_BD = torch.randn(ROWS, DIM, generator=generator)
    return F.normalize(x_BD).requires_grad_(), torch.randint(0, CLASSES, (ROWS,), generator=generator)


def _differ(found: Tensor, truth: Tensor) -> float:
    """Of the way that the centres went, the share by which they ended apart."""
    truth = truth.detach()
    start = initial_centres(0, len(truth), DIM, 4)
    return float((found.detach() - truth).norm() / (truth - start).norm())


def _align(head: PartialFCHead, labels_B: Tensor) -> Tensor:
    """A second loss on the centres, with a sparse gradient of the batch's rows, as the alignment loss has."""
    rows = labels_B.unique() * head.config.subcentres
    return F.normalize(F.embedding(rows, head.weight, sparse=True)).sum(1).mean()


def _train(head: PartialFCHead, optimizer: torch.optim.Optimizer, *, accumulation: int, aligned: bool) -> Tensor:
    for step in range(3):
        for micro in range(accumulation):
            x_BD, labels_B = _batch(10 * step + micro)
            loss = head(head.gather(x_BD, labels_B, labels_B), step=step)
            (loss + 0.1 * _align(head, labels_B) if aligned else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.weight.detach()


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("accumulation", "aligned", "kept_bytes", "on_sphere"),
    [(1, False, 0, False), (1, True, 1 << 30, False), (3, True, 9000, False), (1, True, 0, True)],
)
def test_fused_and_plain_gradients_train_alike(
    name: str, make: Make, accumulation: int, aligned: bool, kept_bytes: int, on_sphere: bool
) -> None:
    found = []
    for fused in (True, False):
        head = _head(kept_bytes=kept_bytes, **SETTINGS[name])
        optimizer = make(head.parameters(), fused=fused, on_sphere=on_sphere)
        found.append(_train(head, optimizer, accumulation=accumulation, aligned=aligned))
        assert head.weight.grad is None
    assert _differ(found[0], found[1]) < 1e-4


def test_accumulation_over_other_classes_each_time() -> None:
    """A loop of one's own may draw anew for every micro-batch: their union is what moves."""
    found = []
    for fused in (True, False):
        head = _head(sample_rate=0.1)
        optimizer = SGD(head.parameters(), fused=fused)
        for step in range(6):
            x_BD, labels_B = _batch(step)
            head(head.gather(x_BD, labels_B, labels_B), step=step).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        found.append(head.weight.detach())
    assert _differ(found[0], found[1]) < 1e-5


def test_catching_up_equals_a_dense_optimizer() -> None:
    """Momentum and decay in every step, the learning rate changing, most rows drawn seldom."""
    lazy, dense = _head(sample_rate=0.1), _head(sample_rate=0.1)
    dense.settings = dataclasses.replace(dense.settings, sparse_gradient=False)
    ours = CentreSGD(lazy.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01, catch_up=True)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    for step in range(40):
        x_BD, labels_B = _batch(step)
        for head, optimizer in ((lazy, ours), (dense, theirs)):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            loss = head(head.gather(x_BD, labels_B, labels_B), step=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 20:
            state = ours.state_dict()  # brings all rows up to date
            assert _differ(lazy.weight, dense.weight) < 1e-5
            ours = CentreSGD(lazy.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01, catch_up=True)
            ours.load_state_dict(state)
    assert _differ(lazy.weight, dense.weight) > 1e-2, "rows wait until they are drawn"
    ours.settle()
    assert _differ(lazy.weight, dense.weight) < 1e-5


def test_on_the_sphere_lengths_stay_and_momentum_is_tangent() -> None:
    head = _head()
    before = head.weight.detach().norm(dim=1)
    optimizer = SGD(head.parameters(), on_sphere=True)
    _train(head, optimizer, accumulation=1, aligned=False)
    torch.testing.assert_close(head.weight.detach().norm(dim=1), before, rtol=1e-5, atol=0)
    last = head.weight.detach().clone()
    x_BD, labels_B = _batch(99)
    head(head.gather(x_BD, labels_B, labels_B), step=9).backward()
    optimizer.step()
    velocity = optimizer.state[head.weight]["momentum_buffer"]
    along = (velocity * last).sum(1) / last.norm(dim=1)
    assert float(along.abs().max()) < 1e-5 * float(velocity.norm(dim=1).max())


def test_a_step_of_sampled_classes_touches_no_other_row() -> None:
    for make in (SGD, ADAMW):
        head = _head(sample_rate=0.05)
        before = head.weight.detach().clone()
        optimizer = make(head.parameters())
        x_BD, labels_B = _batch(0)
        head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
        (gradient,) = deferred(head.weight) or []
        assert gradient.sampled is not None
        rows = set(gradient.sampled.trimmed(CLASSES).tolist())
        optimizer.step()
        moved = (head.weight != before).any(1).nonzero()[:, 0]
        assert set(moved.tolist()) == rows
        assert len(rows) < CLASSES // 5


def test_centres_changed_before_the_step_are_noticed() -> None:
    head = _head()
    optimizer = SGD(head.parameters())
    x_BD, labels_B = _batch(0)
    head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(CentreGradientError, match="changed between the loss and the optimizer's step"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing waits any more


def test_a_dense_gradient_beside_sampled_ones_is_refused() -> None:
    head = _head(sample_rate=0.2)
    optimizer = SGD(head.parameters())
    x_BD, labels_B = _batch(0)
    (head(head.gather(x_BD, labels_B, labels_B), step=0) + head.weight.square().sum()).backward()
    with pytest.raises(CentreGradientError, match="fused=False"):
        optimizer.step()


def test_catch_up_needs_linear_steps_in_float32() -> None:
    for head, wanted in ((_head(), {"on_sphere": True}), (_head(centre_dtype="bf16"), {})):
        with pytest.raises(ValueError, match="catch_up: expected centres in float32"):
            SGD(head.parameters(), catch_up=True, **wanted)


def test_saved_state_counts_rows_beyond_what_bf16_can() -> None:
    head = _head(centre_dtype="bf16")
    optimizer = ADAMW(head.parameters())
    _train(head, optimizer, accumulation=1, aligned=False)
    optimizer.state[head.weight]["row_steps"].fill_(1001)
    other = ADAMW(head.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[head.weight]["row_steps"], torch.full((CLASSES, 1), 1001.0))
    assert other.state[head.weight]["exp_avg"].dtype == torch.bfloat16


def test_gradients_go_to_grad_again_when_their_optimizer_is_gone() -> None:
    head = _head()
    optimizer = SGD(head.parameters())
    assert deferred(head.weight) is not None
    del optimizer
    x_BD, labels_B = _batch(0)
    head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
    assert head.weight.grad is not None


def test_micro_batches_of_unequal_size() -> None:
    """Their tiles would be cut differently: kept cosines of one must not be taken for another's."""
    found = []
    for fused in (True, False):
        head = _head(kept_bytes=1 << 30)
        head.settings = dataclasses.replace(head.settings, chunk=0)
        optimizer = SGD(head.parameters(), fused=fused)
        for rows in (16, 5, 11):
            x_BD, labels_B = _batch(rows)
            head(head.gather(x_BD[:rows], labels_B[:rows], labels_B[:rows]), step=0).backward()
        optimizer.step()
        found.append(head.weight.detach())
    assert _differ(*found) < 1e-5


def test_a_head_with_waiting_gradients_can_be_copied_and_pickled() -> None:
    head = _head()
    optimizer = SGD(head.parameters(), catch_up=True)
    x_BD, labels_B = _batch(0)
    for _ in range(2):
        head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
        optimizer.step()
    head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.weight, head.weight)
        assert deferred(other.weight) is None


def test_a_closure_is_called_and_its_loss_returned() -> None:
    head = _head()
    optimizer = SGD(head.parameters())
    x_BD, labels_B = _batch(0)
    before, losses = head.weight.detach().clone(), []

    def closure() -> float:
        loss = head(head.gather(x_BD, labels_B, labels_B), step=0)
        loss.backward()
        losses.append(loss.item())
        return losses[0]

    assert [optimizer.step(closure)] == losses
    assert not torch.equal(before, head.weight)


def test_a_gradient_of_the_embeddings_alone_leaves_none_of_the_centres() -> None:
    head = _head()
    optimizer = SGD(head.parameters())
    x_BD, labels_B = _batch(0)
    loss = head(head.gather(x_BD, labels_B, labels_B), step=0)
    torch.autograd.grad(loss, x_BD, retain_graph=True)
    assert deferred(head.weight) == []
    loss.backward()
    assert len(deferred(head.weight) or []) == 1
    optimizer.zero_grad()
    assert deferred(head.weight) == []


def test_a_second_derivative_is_refused() -> None:
    head = _head()
    x_BD, labels_B = _batch(0)
    loss = head(head.gather(x_BD, labels_B, labels_B), step=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x_BD, create_graph=True)


def test_loaded_centres_have_missed_nothing() -> None:
    """Loading in the middle of a run, before the optimizer's state and without it."""
    head = _head(sample_rate=0.1)
    fresh = {name: value.clone() if isinstance(value, Tensor) else value for name, value in head.state_dict().items()}
    optimizer = CentreSGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01, catch_up=True)

    def steps(first: int) -> None:
        for step in range(first, first + 3):
            x_BD, labels_B = _batch(step)
            head(head.gather(x_BD, labels_B, labels_B), step=step).backward()
            optimizer.step()

    steps(0)
    head.load_state_dict(fresh)
    x_BD, labels_B = _batch(9)
    head(head.gather(x_BD, labels_B, labels_B), step=9)
    assert torch.equal(head.weight, fresh["weight"])
    steps(3)
    saved = head.state_dict()["weight"].clone()
    optimizer.settle()
    assert torch.equal(head.weight, saved), "what is saved has missed nothing either"


def test_groups_may_be_added_and_copies_are_refused() -> None:
    first, second = _head(), _head()
    optimizer = SGD(first.parameters())
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.01})
    for head in (first, second):
        x_BD, labels_B = _batch(0)
        head(head.gather(x_BD, labels_B, labels_B), step=0).backward()
    optimizer.step()
    for head in (first, second):
        assert not torch.equal(head.weight, _head().weight)
    with pytest.raises(TypeError, match="copy its state_dict"):
        copy.deepcopy(optimizer)


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_state_of_another_optimizer_is_refused(make: Make) -> None:
    head = _head()
    other = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head.weight.grad = torch.ones_like(head.weight)
    other.step()
    with pytest.raises(ValueError, match="was it saved by another optimizer"):
        make(head.parameters()).load_state_dict(other.state_dict())


def test_numbers_out_of_range_are_refused() -> None:
    head = _head()
    for wanted in ({"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wanted))}.*: expected 0"):
            CentreSGD(head.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, **wanted})
    for betas in ((-0.1, 0.9), (0.9, 1.0)):
        with pytest.raises(ValueError, match="betas: expected 0"):
            CentreAdamW(head.parameters(), lr=0.1, betas=betas, weight_decay=0.0)
