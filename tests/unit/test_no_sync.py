"""No step of the head waits for the device: no operator whose result the host would have to read first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clustering.method.align import alignment_loss
from configs.head import HeadConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreAdamW, CentreSGD

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero", "_coalesce")


class _Syncs(TorchDispatchMode):
    """Names of the operators that would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if name in _WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, dict[str, Any]] = {
    "all classes": {},
    "sampled": {"sample_rate": 0.2},
    "sampled, two of each, filter": {"sample_rate": 0.2, "subcentres": 2, "interclass_filter": 0.3},
    "curricularface": {"loss": "curricularface", "sample_rate": 0.2},
    "adaface": {"loss": "adaface", "margin": 0.4},
    "magface": {"loss": "magface"},
    "bf16 centres and wire": {"centre_dtype": "bf16", "wire_dtype": "bf16", "sample_rate": 0.2},
    "catching up": {"sample_rate": 0.2, "missed_steps": "catch_up"},
    "on the sphere": {"on_sphere": True},
}
SGD: Callable[[PartialFCHead], torch.optim.Optimizer] = lambda head: CentreSGD(  # noqa: E731
    head.parameters(),
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-3,
    on_sphere=head.config.on_sphere,
    catch_up=head.config.missed_steps == "catch_up",
)
ADAMW: Callable[[PartialFCHead], torch.optim.Optimizer] = lambda head: CentreAdamW(  # noqa: E731
    head.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=1e-3, on_sphere=head.config.on_sphere
)


def _step(head: PartialFCHead, optimizer: torch.optim.Optimizer, step: int, micro_batches: int) -> None:
    for micro in range(micro_batches):
        x_BD = torch.randn(8, 12, generator=torch.Generator().manual_seed(micro)).requires_grad_()
        labels_B = torch.arange(8) * 11 + micro
        hard_M = torch.tensor([3, -1, 150, 3])
        head(head.gather(x_BD, labels_B, labels_B), step=step, hard_classes_M=hard_M).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_reads_nothing_back(name: str, make: Callable[[PartialFCHead], torch.optim.Optimizer]) -> None:
    head = PartialFCHead(num_classes=203, embedding_size=12, config=HeadConfig(**SETTINGS[name]), group=None, seed=0)
    optimizer = make(head)
    _step(head, optimizer, 0, 1)  # makes the state
    with _Syncs() as syncs:
        _step(head, optimizer, 1, 1)
        _step(head, optimizer, 2, 3)
    assert syncs.found == []


def test_neither_does_the_alignment_loss() -> None:
    head = PartialFCHead(num_classes=50, embedding_size=12, config=HeadConfig(), group=None, seed=0)
    batch = head.gather(torch.randn(8, 12), torch.tensor([1, 1, 5, -1, 49, 7, 8, 1]), torch.arange(8))
    anchor_CD = torch.nn.functional.normalize(torch.randn(50, 12))
    with _Syncs() as syncs:
        alignment_loss(batch, head.weight, anchor_CD, torch.rand(50), 0).backward()
    assert syncs.found == []


def test_the_check_sees_what_waits() -> None:
    with _Syncs() as syncs:
        assert torch.ones(3).sum().item() == 3
        torch.ones(3)[torch.tensor([True, False, True])]
    assert syncs.found == ["_local_scalar_dense", "index"]
