"""A small training beside a cluster service: fixed or drifting embeddings instead of a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig
from partial_fc.collectives import GatheredBatch, gather_batch
from tests.dist.clustering_cases import CASES, CPU, Case, problem, share_of

ROWS = 12  # of the global batch: a multiple of every world size
EPOCH = 4
STEPS = 16

SETTINGS: dict[str, Any] = {
    "refresh_span": 0.5,
    "iterations": 2,
    "block": 4,
    "warmup_fraction": 0.2,
    "ramp_fraction": 0.25,
    "margin_delta": 0.1,
    "direction": 1,
    "purity_weight": 0.7,
    "bank_momentum": 0.0,
    "noise_gap": 0.0,
    "drop_suspects": False,
}
"""Refreshes begin after 4, 8 and 12 steps and are published 2 steps later; the ramp grows from step 6 to 10."""

AS_SHIPPED: dict[str, Any] = {
    name: getattr(ClusteringConfig(), name) for name in ("bank_momentum", "noise_gap", "drop_suspects")
}
"""Of the settings above those that hide what a test looks at; here as users have them."""


def build(group: dist.ProcessGroup, case: Case, **wanted: Any) -> ClusterService:
    """wanted: `bank_dtype`, `margin`, `stopwatch`, or settings of the clusters."""
    _, labels_N, C, K = problem(case)
    bank_dtype, margin = wanted.pop("bank_dtype", torch.float64), wanted.pop("margin", 0.5)
    stopwatch = wanted.pop("stopwatch", None)
    return ClusterService(
        labels=labels_N.numpy().astype(np.int64),
        num_classes=C,
        dim=case["dim"],
        group=group,
        device=CPU,
        config=ClusteringConfig(**{**SETTINGS, "extra_clusters": (K - C) / C, **wanted}),
        margin=margin,
        total_steps=STEPS,
        steps_per_epoch=EPOCH,
        bank_dtype=bank_dtype,
        stopwatch=stopwatch,
    )


def global_rows(case: Case, step: int) -> Tensor:
    """Sample ids of the global batch of `step`: one order of all samples after the other."""
    count = sum(case["sizes"])
    generator = torch.Generator().manual_seed(17)
    rounds = -(-(step + 1) * ROWS // count)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return stream[step * ROWS : (step + 1) * ROWS]


def batch_at(group: dist.ProcessGroup, case: Case, step: int) -> tuple[Tensor, GatheredBatch]:
    """This rank's rows as a leaf, and the global batch of `step`. `drift` moves embeddings from step to step."""
    x_ND, labels_N, _, _ = problem(case)
    ids_N = global_rows(case, step)
    generator = torch.Generator().manual_seed(1000 + step)
    noise_ND = torch.randn(ROWS, case["dim"], generator=generator, dtype=torch.float64)
    x_ND = F.normalize(x_ND[ids_N] + case.get("drift", 0.0) * noise_ND).float()
    mine = share_of(group, ROWS)
    x_BD = x_ND[mine].clone().requires_grad_()
    return x_BD, gather_batch(x_BD, labels_N[ids_N][mine], ids_N[mine], group)


def weights(service: ClusterService) -> Tensor:
    """Raw class centres of this rank, the same for a class on any number of ranks; a leaf."""
    generator = torch.Generator().manual_seed(3)
    w_CD = torch.randn(service.num_classes, service.bank.points().x_PD.shape[1], generator=generator)
    return w_CD[service.classes.start : service.classes.stop].clone().requires_grad_()


def train(
    service: ClusterService,
    case: Case,
    *,
    start: int = 0,
    stop: int = STEPS,
    each: Callable[[int, GatheredBatch], None] | None = None,
) -> None:
    """Steps [start, stop): `each(step, batch)` looks, then the service observes and advances."""
    for step in range(start, stop):
        batch = batch_at(service.group, case, step)[1]
        if each is not None:
            each(step, batch)
        service.observe(batch)
        service.advance(step)


def snapshot(service: ClusterService) -> dict[str, Any]:
    """What one rank holds, by kind: cut by cluster, cut by class, whole on every rank."""
    p = service._published
    if p is None:
        return {"version": 0, "by_class": {"margins": service.margins_C}}
    return {
        "version": service.version,
        "by_cluster": {"c": p.c_SD.clone()},
        "by_class": {
            "margins": service.margins_C,
            "anchor": p.anchor_RD.clone(),
            "f": p.f_R,
            "hard": p.hard_R,
            "samples": p.samples_R,
            "full margin": p.margin_R,
        },
        "whole": {"code": p.code_I, "class_K": p.class_K, "owner_K": p.owner_K, "weight_K": p.weight_K},
        "statistics": dict(p.statistics),
    }


def trained(group: dist.ProcessGroup, case: Case, stop: int = STEPS, **wanted: Any) -> ClusterService:
    service = build(group, case, **wanted)
    train(service, case, stop=stop)
    return service


NOISY = CASES["labels confused"]
"""The case that has suspects."""
