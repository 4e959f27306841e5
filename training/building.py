"""Parts of a run made as its settings say: those that take many of them."""

from __future__ import annotations

import torch

from clustering.service.service import ClusterService
from configs.schema import RunConfig
from data.loading.batch import Loader
from data.loading.loader import build_loader
from data.rec.records import RecordSet
from training.distributed import Ranks
from training.showing.timing import Stopwatch


def loader_of(config: RunConfig, records: RecordSet, ranks: Ranks, *, batch_size: int) -> Loader:
    """batch_size: of a rank's micro-batch."""
    return build_loader(
        records,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.train.seed,
        backend=config.data.backend,
        device=ranks.device,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        flip=config.data.flip,
        augment=config.augment,
        sampler=config.data.sampler,
        images_per_identity=config.data.images_per_identity,
        window=config.data.window,
    )


def service_of(
    config: RunConfig,
    records: RecordSet,
    ranks: Ranks,
    *,
    total_steps: int,
    steps_per_epoch: int,
    product_dtype: torch.dtype,
) -> ClusterService:
    """product_dtype: of the operands of its matrix products."""
    return ClusterService(
        labels=records.labels,
        num_classes=records.num_classes,
        dim=config.model.embedding_size,
        group=ranks.group,
        device=ranks.device,
        config=config.clustering,
        margin=config.head.margin,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        product_dtype=product_dtype,
        stopwatch=Stopwatch(ranks.device),
    )
