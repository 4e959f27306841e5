"""Parts of a run made as its settings say: those that take many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from backbones import Backbone, build_backbone
from clustering.service.service import ClusterService
from configs.schema import ConfigError, ModelConfig, RunConfig
from data.loading.batch import Loader
from data.loading.loader import build_loader
from data.rec.records import RecordSet
from partial_fc.collectives import extremes
from training.distributed import Ranks, data_parallel
from training.sharded import ShardedBackbone
from training.sharded_units import shard_ranks
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


def new_backbone(model: ModelConfig) -> Backbone:
    """On the CPU, with random weights. Raises ConfigError."""
    try:
        return build_backbone(model.backbone, embedding_size=model.embedding_size, recompute=model.recompute)
    except ValueError as error:
        raise ConfigError(f"model.backbone: {error}") from None


def on_all_ranks(backbone: Backbone, model: ModelConfig, ranks: Ranks) -> DistributedDataParallel | ShardedBackbone:
    """As `model.shard` says. On one rank there is nothing to cut. One all-reduce, and the collectives of either kind.

    backbone: on the CPU. Raises ConfigError.
    """
    if model.graph and ranks.device.type != "cuda":
        raise ConfigError(
            f"model.graph: expected a GPU, whose graphs they are, got {ranks.device.type}: set it to false"
        )
    if ranks.world_size > 1 and model.shard != "none":
        fewest, most = extremes(ranks.host_ranks, ranks.group, ranks.device)
        inside = shard_ranks(model.shard, ranks.world_size, most if fewest == most else -1)
        if inside > 1:
            return ShardedBackbone(backbone, ranks, inside)
    return data_parallel(backbone.to(ranks.device), ranks, compiled=model.compile)


@contextmanager
def whole(backbone: DistributedDataParallel | ShardedBackbone) -> Iterator[Backbone]:
    """The backbone, to be run without gradients, by some ranks more often than by others. A sharded one is gathered."""
    if isinstance(backbone, ShardedBackbone):
        with backbone.gathered() as module:
            yield module
    else:
        assert isinstance(backbone.module, Backbone)
        yield backbone.module


def weights_of(backbone: DistributedDataParallel | ShardedBackbone) -> dict[str, Tensor]:
    """Its state dict, whole, on rank 0. A sharded one is gathered, weight by weight, by all ranks."""
    return backbone.weights() if isinstance(backbone, ShardedBackbone) else backbone.module.state_dict()


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
