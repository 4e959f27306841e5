"""`PartialFC` in a loop of one's own: plain DDP, any optimizer, one process, the same clear errors on all ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import ConfigError
from partial_fc import CentreAdamW, CentreSGD, HeadStateError, PartialFC, PartialFCInputError
from partial_fc.reference import dense_margin_softmax
from tests.ranks import WORLD_SIZES, RankPool

ROOT = Path(__file__).parents[2]
CLASSES, ROWS = 37, 8


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(ROWS, 12, generator=generator), torch.randint(0, CLASSES, (ROWS,), generator=generator)


def _backbone() -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def _ddp(group: dist.ProcessGroup) -> tuple[float, list[Tensor], Tensor]:
    """Plain DDP, which averages; gradients of the backbone and of this rank's centres."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    inputs, labels = _data()
    model = DistributedDataParallel(_backbone(), process_group=group)
    head = PartialFC(num_classes=CLASSES, embedding_size=10, group=group, scale=20.0)
    loss = head(model(inputs[mine]), labels[mine])
    loss.backward()
    assert head.weight.grad is not None
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], head.weight.grad


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_under_plain_ddp_the_gradients_are_those_of_the_global_loss(ranks: RankPool, world_size: int) -> None:
    inputs, labels = _data()
    backbone = _backbone().double()
    centres = PartialFC(num_classes=CLASSES, embedding_size=10).weight.detach().double().requires_grad_()
    margins_C = torch.full((CLASSES,), 0.5, dtype=torch.float64)
    loss = dense_margin_softmax(backbone(inputs.double()), centres, labels, margins_C, scale=20.0)
    loss.backward()
    parts = ranks.run(world_size, _ddp)
    for found_loss, gradients, _ in parts:
        assert found_loss == pytest.approx(loss.item(), rel=1e-5)
        for found, p in zip(gradients, backbone.parameters(), strict=True):
            assert p.grad is not None
            assert torch.linalg.norm(found - p.grad) < 1e-5 * torch.linalg.norm(p.grad)
    assert centres.grad is not None
    found = torch.cat([part[2] for part in parts])
    assert torch.linalg.norm(found - centres.grad) < 1e-5 * torch.linalg.norm(centres.grad)


def _summed(group: dist.ProcessGroup) -> Tensor:
    head = PartialFC(num_classes=CLASSES, embedding_size=10, group=group, backbone_gradients="summed")
    averaged = PartialFC(num_classes=CLASSES, embedding_size=10, group=group)
    inputs, labels = _data()
    gradients = []
    for module in (head, averaged):
        x_BD = inputs[:2, :10].clone().requires_grad_()
        module(x_BD, labels[:2]).backward()
        assert x_BD.grad is not None
        gradients.append(x_BD.grad)
    return gradients[1] / gradients[0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_averaged_gradients_are_the_summed_ones_times_the_ranks(ranks: RankPool, world_size: int) -> None:
    for ratio in ranks.run(world_size, _summed):
        assert torch.allclose(ratio, torch.full_like(ratio, world_size), rtol=1e-5)


_SGD = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4}
_ADAMW = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.01}
OPTIMIZERS: dict[str, tuple[bool, Any]] = {
    "CentreSGD": (True, lambda p: CentreSGD(p, **_SGD)),
    "CentreAdamW": (True, lambda p: CentreAdamW(p, **_ADAMW)),
    "CentreSGD, .grad": (True, lambda p: CentreSGD(p, **_SGD, fused=False)),
    "CentreAdamW, .grad": (True, lambda p: CentreAdamW(p, **_ADAMW, fused=False)),
    "SGD": (False, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
    "AdamW": (False, lambda p: torch.optim.AdamW(p, lr=0.02)),
    "RMSprop": (False, lambda p: torch.optim.RMSprop(p, lr=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_trains_in_one_process_with_any_optimizer(name: str, sample_rate: float) -> None:
    sparse, build = OPTIMIZERS[name]
    inputs, labels = _data()
    backbone = _backbone()
    head = PartialFC(
        num_classes=CLASSES, embedding_size=10, scale=12.0, margin=0.2, sample_rate=sample_rate, sparse_gradient=sparse
    )
    optimizers = [torch.optim.AdamW(backbone.parameters(), lr=0.02), build(head.parameters())]
    losses = []
    for _ in range(40):
        loss = head(backbone(inputs), labels)
        loss.backward()
        if name in ("CentreSGD", "CentreAdamW"):
            assert head.weight.grad is None, "these make it themselves"
        else:
            assert head.weight.grad is not None
            assert head.weight.grad.is_sparse == (sparse and sample_rate < 1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_under_autocast_the_head_stays_in_float32(sample_rate: float) -> None:
    inputs, labels = _data()
    gradients = []
    for enabled in (False, True):
        head = PartialFC(num_classes=CLASSES, embedding_size=12, sample_rate=sample_rate, sparse_gradient=False)
        x_BD = inputs.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            head(x_BD, labels).backward()
        assert head.weight.grad is not None
        gradients.append((x_BD.grad, head.weight.grad))
    for plain, cast in zip(*gradients, strict=True):
        torch.testing.assert_close(cast, plain)


def test_dense_and_sparse_gradients_are_the_same_numbers() -> None:
    inputs, labels = _data()
    gradients = []
    for sparse in (True, False):
        head = PartialFC(num_classes=CLASSES, embedding_size=12, sample_rate=0.3, sparse_gradient=sparse)
        head(inputs, labels).backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.to_dense())
    assert torch.equal(*gradients)


def test_each_step_draws_other_classes_and_a_loaded_state_goes_on_with_them() -> None:
    inputs, labels = _data()

    def drawn(head: PartialFC) -> list[int]:
        head.weight.grad = None
        head(inputs, labels).backward()
        assert head.weight.grad is not None
        return head.weight.grad.coalesce().indices()[0].tolist()  # type: ignore[no-any-return]

    head = PartialFC(num_classes=CLASSES, embedding_size=12, sample_rate=0.3)
    assert drawn(head) != drawn(head)
    other = PartialFC(num_classes=CLASSES, embedding_size=12, sample_rate=0.3)
    other.load_state_dict(head.state_dict())
    assert drawn(other) == drawn(head)


def _wrong(group: dist.ProcessGroup, what: str) -> str:
    """Only the last rank has the bad input; afterwards all ranks must still be together."""
    head = PartialFC(num_classes=CLASSES, embedding_size=12, group=group)
    inputs, labels = _data()
    inputs, labels = inputs[:2].clone(), labels[:2].clone()
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        if what == "label":
            labels[1] = CLASSES
        else:
            inputs[0, 3] = float(what)
    with pytest.raises(PartialFCInputError) as error:
        head(inputs, labels)
    dist.barrier(group)
    return str(error.value)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("what", ["label", "nan", "inf"])
def test_bad_input_on_one_rank_is_the_same_error_on_all(ranks: RankPool, what: str, world_size: int) -> None:
    messages = ranks.run(world_size, _wrong, what)
    assert len(set(messages)) == 1
    expected = "labels: expected -1 or 0 … 36" if what == "label" else "of the global batch is not finite"
    assert expected in messages[0]


def _shapes(group: dist.ProcessGroup) -> list[str]:
    head = PartialFC(num_classes=CLASSES, embedding_size=12, group=group)
    inputs, labels = _data()
    found = []
    for x, y, margins in (
        (inputs[0], labels[:1], None),
        (inputs[:, :7], labels, None),
        (inputs, labels[:3], None),
        (inputs, labels, torch.zeros(3)),
    ):
        with pytest.raises(PartialFCInputError) as error:
            head(x, y, class_margins_C=margins)
        found.append(str(error.value))
    with pytest.raises(ValueError, match=r"group: expected one"):
        PartialFC(num_classes=CLASSES, embedding_size=12)
    return found


def test_shapes_that_do_not_fit_and_a_forgotten_group(ranks: RankPool) -> None:
    for messages in ranks.run(2, _shapes):
        assert all("expected embeddings (B, 12) and labels (B,)" in message for message in messages[:3])
        assert "expected one margin for each of this rank's" in messages[3]


def _state(group: dist.ProcessGroup, classes: int) -> dict[str, Any]:
    return PartialFC(num_classes=classes, embedding_size=10, group=group).state_dict()


@pytest.mark.parametrize(
    ("world_size", "classes", "said"),
    [(2, 74, "num_classes = 74, this head has 37"), (2, 37, "world_size = 2, this head has 1")],
)
def test_a_state_that_does_not_fit_is_a_typed_error(ranks: RankPool, world_size: int, classes: int, said: str) -> None:
    state = ranks.run(world_size, _state, classes)[0]
    with pytest.raises(HeadStateError, match=said):
        PartialFC(num_classes=37, embedding_size=10).load_state_dict(state)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"margin": 1.6}, ConfigError, "head.margin"),
        ({"sample_rate": 0.0}, ConfigError, "head.sample_rate"),
        ({"loss": "softmax"}, ConfigError, "head.loss"),
        ({"subcentres": 2.5}, ConfigError, "head.subcentres: expected a whole number"),
        ({"sampel_rate": 0.1}, ConfigError, "sampel_rate: unknown setting; did you mean sample_rate"),
        ({"on_sphere": True}, ConfigError, "on_sphere: expected with the optimizer"),
        ({"loss": "curricularface", "scale": 65.0}, ConfigError, "head.scale: expected 0 < scale <= 64"),
        ({"num_classes": 1}, ValueError, "at least 2 classes"),
        ({"backbone_gradients": "both"}, ValueError, "expected averaged or summed"),
    ],
)
def test_settings_out_of_range(wanted: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PartialFC(**{"num_classes": 9, "embedding_size": 4, **wanted})


def test_the_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "PartialFC" in block)
    assert len(example.strip().splitlines()) <= 16
    names: dict[str, Any] = {}
    exec(example, names)
    assert torch.isfinite(names["loss"])
