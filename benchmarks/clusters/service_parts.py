"""Seconds of one core for each part of a training step and of the cluster service beside it, in units that scale.

Legend: B images, N rows of the global batch, D embedding size, C classes, K clusters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from backbones import build_backbone
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, HeadConfig
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks


@dataclass(frozen=True, slots=True)
class Part:
    """A measured part."""

    seconds: float
    """Of one unit."""
    unit: str


def _median(work: Callable[[], object], repeats: int) -> float:
    """Seconds that this thread computes in a call, after one of warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds[1:])


def measure_parts(ranks: Ranks, *, dim: int, small: bool) -> dict[str, Part]:
    """Every part of `benchmarks.service.how_often`."""
    B, N, per_class, C = (2, 64, 8, 60) if small else (8, 1024, 55, 1000)
    repeats = 1 if small else 3
    generator = torch.Generator().manual_seed(0)

    backbone = build_backbone("iresnet50", embedding_size=dim)
    backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(B, 3, 112, 112, generator=generator).contiguous(memory_format=torch.channels_last)
    parts = {"backbone": Part(_median(lambda: backbone(images).sum().backward(), repeats) / B, "an image")}

    labels = np.repeat(np.arange(C), per_class)
    truth_CD = F.normalize(torch.randn(C, dim, generator=generator))
    x_PD = F.normalize(truth_CD[labels] + 1.2 * dim**-0.5 * torch.randn(len(labels), dim, generator=generator))

    def batch_of(rows: torch.Tensor) -> GatheredBatch:
        x_ND = x_PD[rows].clone().requires_grad_()
        return GatheredBatch(x_ND, torch.from_numpy(labels)[rows], rows, ranks.group)

    batch = batch_of(torch.randperm(len(labels), generator=generator)[:N])
    head = PartialFCHead(num_classes=8 * C, embedding_size=dim, config=HeadConfig(), group=ranks.group, seed=0)
    parts["head"] = Part(
        _median(lambda: head(batch, step=0).backward(), repeats) / (N * 8 * C), "a row and class, with its gradients"
    )

    service = _service(labels, C, dim, ranks)
    for start in range(0, len(labels), N):
        service.observe(batch_of(torch.arange(start, min(start + N, len(labels)))))
    parts |= _refresh(service, len(labels))
    parts["bank and centres"] = Part(_median(lambda: service.observe(batch), 3 * repeats) / N, "a row")
    parts["row margins"] = Part(_median(lambda: service.row_margins(batch), 3 * repeats) / N, "a row")
    pairs = N * service.num_clusters
    parts["contrastive"] = Part(
        _median(lambda: service.contrastive(batch).backward(), repeats) / pairs, "a row and cluster, with its gradient"
    )
    weight_CD = torch.randn(C, dim, generator=generator).requires_grad_()
    alignment = _median(lambda: service.alignment(batch, weight_CD).backward(), repeats)
    parts["alignment"] = Part(alignment / N, "a row, with its gradients")
    return parts


def _service(labels: np.ndarray, C: int, dim: int, ranks: Ranks) -> ClusterService:
    return ClusterService(
        labels=labels,
        num_classes=C,
        dim=dim,
        group=ranks.group,
        device=ranks.device,
        config=ClusteringConfig(warmup_fraction=0.0, ramp_fraction=0.0, refresh_span=1.0),
        margin=0.5,
        total_steps=10**6,
        steps_per_epoch=10**5,
    )


def _refresh(service: ClusterService, samples: int) -> dict[str, Part]:
    """Times the slices of one refresh by kind, and adopts what it publishes."""
    refresh = service._new_refresh()
    seconds = dict.fromkeys(("assign", "seed", "mean", "publication"), 0.0)
    counts = dict.fromkeys(seconds, 0)
    while refresh.done < refresh.length:
        in_run = refresh.done < refresh.run.length
        kind = refresh.run.kind_of_next if in_run else "publication"
        began = time.thread_time()
        refresh.advance()
        seconds[kind] += time.thread_time() - began
        counts[kind] += 1
    assert refresh.published is not None
    service._adopt(refresh.published)
    iterations = service.config.iterations
    return {
        "assign": Part(seconds["assign"] / (iterations * samples * service.num_clusters), "a sample and cluster"),
        "gate and seed": Part(seconds["seed"] / (iterations * samples), "a sample"),
        "mean": Part(seconds["mean"] / ((iterations + 1) * samples), "a sample"),
        "publication": Part(seconds["publication"] / samples, "a sample"),
    }
