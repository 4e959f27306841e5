"""Cases of the sharded head, and their truth: a dense head in float64, written out with autograd, every loss in it.

Inputs are float32 numbers, and the truth is computed from the very same: what differs is the head's own rounding.
Embeddings are made unit ones before either sees them, and neither normalises them again.

Legend: N rows of the global batch, B of one rank, D embedding size, C classes, K sub-centres a class, R = C K rows of
the weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.schema import HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from partial_fc.sampling import drawn_classes
from sharding import Shard

SCALE, SEED, STEP = 64.0, 1, 3
CLASS_MARGINS = (0.35, 0.65)

LOSSES: dict[str, dict[str, Any]] = {
    "arcface": {},
    "cosface": {"loss": "cosface"},
    "combined": {"loss": "combined", "m1": 1.2, "m3": 0.1},
    "straight through, filter": {"straight_through": True, "interclass_filter": 0.2},
    "magface": {"loss": "magface"},
    "adaface": {"loss": "adaface"},
    "curricularface": {"loss": "curricularface", "running_momentum": 0.7},
    "sub-centres": {"subcentres": 3},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    dim: int
    classes: int
    loss: str = "arcface"
    rate: float = 1.0
    pull: float = 0.5
    """How far embeddings lie towards their class: 0 for untrained ones, 1 for ones whose loss is small."""
    impl: Literal["auto", "reference"] = "auto"
    products: torch.dtype = torch.float32
    wire: Literal["fp32", "bf16"] = "fp32"

    @property
    def config(self) -> HeadConfig:
        return HeadConfig(scale=SCALE, sample_rate=self.rate, impl=self.impl, wire_dtype=self.wire, **LOSSES[self.loss])


class Found(NamedTuple):
    """loss, and its gradients in unit embeddings, in lengths (none where the loss reads none) and in raw centres."""

    loss: float
    x_ND: Tensor
    length_N: Tensor | None
    w_RD: Tensor


@functools.lru_cache(maxsize=4)
def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings near a centre of their class, lengths, raw centres of uneven length, labels, class margins;
    float32. One row in ten has no label."""
    generator = torch.Generator().manual_seed(case.rows * case.dim + case.classes)
    K = case.config.subcentres
    w_RD = torch.randn(case.classes * K, case.dim, generator=generator)
    w_RD *= torch.rand(len(w_RD), 1, generator=generator) + 0.1
    labels_N = torch.randint(0, case.classes, (case.rows,), generator=generator)
    x_ND = torch.randn(case.rows, case.dim, generator=generator)
    x_ND = F.normalize(x_ND + case.pull * F.normalize(w_RD)[labels_N * K] * case.dim**0.5)
    length_N = 5 + 125 * torch.rand(case.rows, generator=generator)  # beyond magface's bounds at either end
    low, high = CLASS_MARGINS
    margins_C = low + (high - low) * torch.rand(case.classes, generator=generator)
    labels_N[9::10] = -1
    if case.wire == "bf16":
        x_ND = x_ND.bfloat16().float()  # so that the wire loses nothing of them
    return x_ND, length_N, w_RD, labels_N, margins_C


def turned(cosine_N: Tensor, margin_N: Tensor, m1: float = 1.0) -> Tensor:
    """cos(m1 theta + m) by way of the angle; beyond pi or 0 a straight line in the cosine."""
    theta_N = m1 * cosine_N.arccos() + margin_N
    above_N = cosine_N - ((math.pi - margin_N) / m1).cos() - 1
    below_N = cosine_N - margin_N.cos() + 1
    return torch.where(theta_N > math.pi, above_N, torch.where(theta_N < 0, below_N, theta_N.cos()))


def _psi(case: Case, cosine_N: Tensor, margin_N: Tensor, length_N: Tensor) -> Tensor:
    """What each loss makes of the target's cosine."""
    config = case.config
    if config.loss == "cosface":
        return cosine_N - margin_N
    if config.loss == "combined":
        return turned(cosine_N, margin_N, config.m1) - config.m3
    if config.straight_through:
        return cosine_N + ((cosine_N.arccos() + margin_N).cos() - cosine_N).detach()
    if config.loss == "magface":
        share_N = (length_N.clamp(config.length_low, config.length_high) - config.length_low) / (
            config.length_high - config.length_low
        )
        by_length_N = config.margin_low + (config.margin_high - config.margin_low) * share_N
        return turned(cosine_N, by_length_N + margin_N - config.margin)
    if config.loss == "adaface":
        deviation = length_N.std() if len(length_N) > 1 else torch.tensor(0.0)
        mean = length_N.mean() if len(length_N) > 1 else torch.tensor(0.0)
        z_N = ((length_N - mean) * config.quality_spread / deviation.clamp_min(1e-3)).clamp(-1, 1).detach()
        return turned(cosine_N, -margin_N * z_N) - margin_N * (1 + z_N)
    return turned(cosine_N, margin_N)


def _others(case: Case, cosine_NC: Tensor, cosine_N: Tensor, psi_N: Tensor) -> Tensor:
    """What each loss makes of the other classes' cosines."""
    config = case.config
    if config.interclass_filter:
        return torch.where(cosine_NC > config.interclass_filter, 0, cosine_NC)
    if config.loss == "curricularface":
        t = (1 - config.running_momentum) * cosine_N.mean().detach().clamp_min(0)
        return torch.where(cosine_NC > psi_N[:, None], cosine_NC * (t + cosine_NC), cosine_NC)
    return cosine_NC


def dense_loss(case: Case, x_ND: Tensor, length_N: Tensor, w_RD: Tensor, labels_N: Tensor, margins_C: Tensor) -> Tensor:
    """Mean loss over the rows with a label. x_ND: unit embeddings."""
    known_N, config = labels_N >= 0, case.config
    y_N, length_N = labels_N[known_N], length_N[known_N]
    unit_RD = w_RD / w_RD.norm(dim=1, keepdim=True)
    cosine_NC = (x_ND[known_N] @ unit_RD.T).unflatten(1, (case.classes, -1)).amax(2)
    cosine_N = cosine_NC.gather(1, y_N[:, None])[:, 0]
    psi_N = _psi(case, cosine_N, margins_C[y_N], length_N)
    logits_NC = SCALE * _others(case, cosine_NC, cosine_N, psi_N).scatter(1, y_N[:, None], psi_N[:, None])
    if case.rate < 1:
        whole = Shard(0, case.classes)
        takes_part_C = drawn_classes(whole, case.classes, case.rate, seed=SEED, step=STEP, device=w_RD.device)
        takes_part_C[y_N] = True
        logits_NC = logits_NC.masked_fill(~takes_part_C, -math.inf)
    loss_N = F.cross_entropy(logits_NC, y_N, reduction="none")
    if config.loss == "magface":
        loss_N = loss_N + config.length_weight * (length_N / config.length_high**2 + 1 / length_N)
    return loss_N.mean()


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Floats in float64, as leaves that take a gradient; the rest as it is."""
    return [t.double().requires_grad_() if t.is_floating_point() else t for t in tensors]


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> Found:
    x_ND, length_N, w_RD, labels_N, margins_C = doubled(problem(case))
    loss = dense_loss(case, x_ND, length_N, w_RD, labels_N, margins_C)
    loss.backward()
    assert x_ND.grad is not None
    assert w_RD.grad is not None
    return Found(loss.item(), x_ND.grad, length_N.grad, w_RD.grad)


def sharded(group: dist.ProcessGroup, case: Case) -> Found:
    """This rank's part."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    x_ND, length_N, w_RD, labels_N, margins_C = problem(case)
    head = PartialFCHead(
        num_classes=case.classes,
        embedding_size=case.dim,
        config=case.config,
        group=group,
        seed=SEED,
        product_dtype=case.products,
    )
    head.settings = dataclasses.replace(head.settings, chunk=50)
    shard, K = head.shard, head.config.subcentres
    head.weight.data.copy_(w_RD[shard.start * K : shard.stop * K])
    B = case.rows // world_size
    mine = slice(rank * B, (rank + 1) * B)
    x_BD, length_B = x_ND[mine].clone().requires_grad_(), length_N[mine].clone().requires_grad_()
    reads_length = head.config.loss in ("magface", "adaface")
    batch = gather_batch(
        x_BD,
        labels_N[mine],
        torch.arange(case.rows)[mine],
        group,
        length_B=length_B if reads_length else None,
        wire_dtype=torch.bfloat16 if case.wire == "bf16" else torch.float32,
    )
    loss = head(batch, step=STEP, class_margins_C=margins_C[shard.start : shard.stop])
    loss.backward()
    assert x_BD.grad is not None
    assert head.weight.grad is not None
    return Found(loss.item(), x_BD.grad, length_B.grad, head.weight.grad.to_dense())


def whole(parts: list[Found]) -> Found:
    length_N = None if parts[0].length_N is None else torch.cat([part.length_N for part in parts])  # type: ignore[misc]
    assert len({part.loss for part in parts}) == 1, "the same on all ranks"
    return Found(parts[0].loss, torch.cat([p.x_ND for p in parts]), length_N, torch.cat([p.w_RD for p in parts]))


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_near(found: Found, truth: Found, bound: float) -> None:
    assert found.loss == pytest.approx(truth.loss, rel=bound, abs=0)
    assert relative(found.x_ND, truth.x_ND) <= bound
    assert relative(found.w_RD, truth.w_RD) <= bound
    if truth.length_N is not None and found.length_N is not None:
        assert relative(found.length_N, truth.length_N) <= bound
