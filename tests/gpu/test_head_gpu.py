"""The head on a GPU: what the CPU computes, without a host sync, in bounded memory. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs.head import HeadConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from tests.unit.test_fused_optim import _align

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SETTINGS: dict[str, dict[str, Any]] = {
    "triton": {"impl": "triton"},
    "torch": {"impl": "torch"},
    "triton, sampled": {"impl": "triton", "sample_rate": 0.1},
    "torch, sampled": {"impl": "torch", "sample_rate": 0.1},
    "sub-centres, sampled": {"subcentres": 3, "sample_rate": 0.1},
    "curricularface": {"loss": "curricularface"},
}


def _head(device: str, classes: int, product_dtype: torch.dtype = torch.float32, **settings: Any) -> PartialFCHead:
    return PartialFCHead(
        num_classes=classes,
        embedding_size=252,
        config=HeadConfig(**settings),
        group=None,
        seed=0,
        product_dtype=product_dtype,
    ).to(device)


def _train(head: PartialFCHead, steps: range, *, aligned: bool = False) -> torch.Tensor:
    """aligned: with rows of another loss's gradient beside the softmax's."""
    optimizer = CentreSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x_BD = F.normalize(torch.randn(123, 252, generator=generator)).to(head.weight.device).requires_grad_()
        labels_B = torch.randint(0, head.num_classes, (123,), generator=generator).to(head.weight.device)
        loss = head(head.gather(x_BD, labels_B, labels_B), step=step)
        (loss + 0.1 * _align(head, labels_B) if aligned else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.weight.detach()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_trains_as_on_the_cpu(name: str, aligned: bool) -> None:
    settings = SETTINGS[name]
    start = _head("cpu", 4099, **settings).weight.detach()
    truth = _train(_head("cpu", 4099, **{**settings, "impl": "torch"}), range(4), aligned=aligned)
    found = _train(_head("cuda", 4099, **settings), range(4), aligned=aligned).cpu()
    assert float((found - truth).norm() / (truth - start).norm()) < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_device(name: str) -> None:
    head = _head("cuda", 4099, torch.bfloat16, **SETTINGS[name])
    optimizer = CentreSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    batches = []
    for _ in range(3):
        x_BD = F.normalize(torch.randn(123, 252, device="cuda")).requires_grad_()
        batches.append((x_BD, torch.randint(0, 4099, (123,), device="cuda")))
    for step, (x_BD, labels_B) in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first loads, tunes and makes the state
        try:
            head(head.gather(x_BD, labels_B, labels_B), step=step).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_extra_memory_does_not_grow_with_the_classes(impl: str) -> None:
    extra = []
    for classes in (1_000_000, 2_000_000):
        head = _head("cuda", classes, torch.bfloat16, impl=impl)
        _train(head, range(1))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        x_BD = F.normalize(torch.randn(1024, 252, device="cuda")).requires_grad_()
        labels_B = torch.randint(0, classes, (1024,), device="cuda")
        head(head.gather(x_BD, labels_B, labels_B), step=0)
        extra.append(torch.cuda.max_memory_allocated() - held)
        del head
    assert extra[1] < 1.1 * extra[0]
