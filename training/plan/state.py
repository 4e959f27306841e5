"""Bytes of what a run keeps: exact, as tensors have them, and the same for planner and doctor.

Shards are of unequal size by one class; the rank that holds most is counted.

Legend: C classes, R classes of the rank, K clusters, S clusters of the rank, P samples of the rank, N of the set,
D embedding size, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backbones import IMAGE_SIZE
from clustering.service import seeds
from configs.schema import ConfigError, RunConfig
from data.rec.layout import Labels
from sharding import all_shards
from training.plan.counting import BackboneSizes, backbone_sizes
from training.sharded_units import shard_ranks

PIXELS = IMAGE_SIZE[0] * IMAGE_SIZE[1] * 3
IMAGE_BYTES = PIXELS + 16
"""An image of a batch as it was decoded, with its class and its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the settings do not say."""

    classes: int
    samples: int
    ranks: int
    own_classes: int
    own_samples: int
    """Of the rank that has most."""
    host_ranks: int = 0
    """Ranks of each host; 0: all are on one."""


def sizes_of(labels: Labels, classes: int, ranks: int, host_ranks: int = 0) -> Sizes:
    """labels: int64, the class of each sample of the set."""
    before = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=classes))])
    shards = all_shards(ranks, classes)
    most = max(int(before[shard.stop] - before[shard.start]) for shard in shards)
    return Sizes(
        classes=classes,
        samples=len(labels),
        ranks=ranks,
        own_classes=shards[0].size,
        own_samples=most,
        host_ranks=host_ranks,
    )


def even_sizes(classes: int, samples: int, ranks: int, host_ranks: int = 0) -> Sizes:
    """Of a set that is not at hand: every class has as many samples."""
    own = -(-classes // ranks)
    most = -(-samples * own // classes)
    return Sizes(
        classes=classes, samples=samples, ranks=ranks, own_classes=own, own_samples=most, host_ranks=host_ranks
    )


def copy_ranks(config: RunConfig, sizes: Sizes) -> int:
    """Ranks that share out one copy of the backbone (`model.shard`); 1: each has its own. Raises ConfigError."""
    return shard_ranks(config.model.shard, sizes.ranks, sizes.host_ranks)


def backbone_of(config: RunConfig) -> BackboneSizes:
    """Raises ConfigError for a backbone that is not known."""
    try:
        return backbone_sizes(config.model.backbone, embedding_size=config.model.embedding_size)
    except ValueError as error:
        raise ConfigError(f"model.backbone: {error}") from None


def backbone_moments(config: RunConfig) -> int:
    """State tensors of the backbone's optimizer."""
    if config.optim.name == "adamw":
        return 2
    return int(config.optim.momentum > 0)


def centre_bytes(config: RunConfig, classes: int) -> tuple[int, int]:
    """Bytes of class centres and of their optimizer's state."""
    rows = classes * config.head.subcentres
    one = rows * config.model.embedding_size * (2 if config.head.centre_dtype == "bf16" else 4)
    if config.optim.name == "adamw":
        return one, 2 * one + 4 * rows
    return one, one + (4 * rows if config.head.missed_steps == "catch_up" else 0)


def images_ahead_bytes(config: RunConfig, batch: int) -> int:
    """On the host, of a rank that takes so many images at a time: batches in work, and the one it holds."""
    return (config.data.prefetch + 2) * batch * IMAGE_BYTES


def clusters_of_rank(config: RunConfig, sizes: Sizes) -> int:
    """S of the rank that has most."""
    return -(-config.clustering.num_clusters(sizes.classes) // sizes.ranks)


def bank_bytes(config: RunConfig, sizes: Sizes) -> int:
    """The embedding bank in bf16 with a row to spare, which samples were seen, their classes and ids, and where each
    sample of the set lies."""
    P = sizes.own_samples
    return (2 * config.model.embedding_size + 1) * (P + 1) + 16 * P + 4 * sizes.samples


def version_bytes(config: RunConfig, sizes: Sizes) -> int:
    """One version of the clusters, as a rank holds it (`clustering.service.published`)."""
    D, C, R = config.model.embedding_size, sizes.classes, sizes.own_classes
    K, S = config.clustering.num_clusters(C), clusters_of_rank(config, sizes)
    return 4 * D * (S + R) + 4 * sizes.samples + 20 * K + 28 * R + 4 * C * config.clustering.hard_negatives


def pulled_bytes(config: RunConfig, sizes: Sizes) -> int:
    """What a step needs of it besides (`clustering.service.pulled`), but for the rows of classes that own no cluster:
    nobody knows how many there are."""
    return 8 * (config.clustering.num_clusters(sizes.classes) + sizes.own_classes)


def snapshot_bytes(config: RunConfig, sizes: Sizes) -> int:
    """The bank as it was when a refresh began."""
    return (2 * config.model.embedding_size + 1) * sizes.own_samples


def kmeans_bytes(config: RunConfig, sizes: Sizes) -> int:
    """What a run of k-means keeps: centres, those shown by another rank, sums, counts, levels of seeds, and four
    things a sample."""
    D, S = config.model.embedding_size, clusters_of_rank(config, sizes)
    shown = 4 * D * S if sizes.ranks > 1 else 0
    K = config.clustering.num_clusters(sizes.classes)
    return 4 * D * S + shown + 8 * D * S + 8 * K + seeds.buffer_bytes(sizes.ranks) + 18 * sizes.own_samples


def publication_bytes(config: RunConfig, sizes: Sizes) -> int:
    """What a publication makes when its refresh begins; of it, anchors and codes go into the next version."""
    D, R, k = config.model.embedding_size, sizes.own_classes, config.clustering.hard_negatives
    K = config.clustering.num_clusters(sizes.classes)
    numbers = 56 * R + 8 * K + 24 + k * (8 * R + 4 * sizes.classes)
    return 12 * D * R + numbers + 9 * sizes.own_samples + 4 * sizes.samples


def saved_clusters(config: RunConfig, sizes: Sizes, classes: int, samples: int) -> int:
    """Bytes of the cluster service in a checkpoint, with a refresh under way, of so many classes and samples."""
    D, C = config.model.embedding_size, sizes.classes
    K = config.clustering.num_clusters(C)
    clusters = -(-K * classes // C)
    bank = (2 * D + 1) * samples
    version = 4 * D * (clusters + classes) + 28 * classes
    whole = 4 * sizes.samples + 20 * K + 4 * C * config.clustering.hard_negatives
    refresh = 2 * D * samples + 18 * samples + 4 * D * clusters
    return bank + version + whole + refresh


def checkpoint_bytes(config: RunConfig, sizes: Sizes) -> tuple[int, int]:
    """A whole checkpoint, all ranks together; and the part that the rank with most copies on its host."""
    net = backbone_of(config)
    backbone = 4 * net.parameters * (1 + backbone_moments(config))
    saved = backbone + net.buffers + sum(centre_bytes(config, sizes.classes))
    own = -(-backbone // copy_ranks(config, sizes))
    copied = own + net.buffers + sum(centre_bytes(config, sizes.own_classes))
    if config.clustering.enabled:
        saved += saved_clusters(config, sizes, sizes.classes, sizes.samples)
        copied += saved_clusters(config, sizes, sizes.own_classes, sizes.own_samples)
    return saved, copied
