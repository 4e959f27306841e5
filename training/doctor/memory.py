"""Bytes of a run, counted from its settings: what lies on each rank's device, on the host, and in a checkpoint.

Counted is what has a known size. Activations of the backbone, workspaces of libraries and what an allocator leaves
unused are not. Shards are of unequal size by one class; the rank with the most samples is counted.

Legend: C classes, R classes of the rank, K clusters, S clusters of the rank, P samples of the rank, N of the set,
D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from backbones import IMAGE_SIZE, build_backbone
from configs.schema import ConfigError, RunConfig
from data.rec.layout import Labels
from sharding import all_shards
from training.doctor.finding import Finding, size_text

Place = Literal["device", "host"]
_PIXELS = IMAGE_SIZE[0] * IMAGE_SIZE[1] * 3
_TIGHT = 0.7
"""Share of the memory from which on activations may not find room."""
_HEAD_TILES = {"cpu": 3 * (16 << 20), "cuda": 3 * (256 << 20)}
"""Of the head: logits, centres and gradient of a tile (`partial_fc.tiles`)."""
_HEAD_KEPT = 256 << 20
"""Cosines that a step keeps for the optimizer, at the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Something that takes memory on a rank."""

    name: str
    bytes: int
    place: Place = "device"
    at_a_time: bool = False
    """There for a while only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """rows: of the rank that holds most; checkpoint: bytes of a whole one, all ranks together."""

    rows: tuple[Row, ...]
    checkpoint: int

    def total(self, place: Place) -> int:
        return sum(row.bytes for row in self.rows if row.place == place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the settings do not say."""

    classes: int
    samples: int
    ranks: int
    own_classes: int
    own_samples: int
    """Of the rank that has most."""


def sizes_of(labels: Labels, classes: int, ranks: int) -> Sizes:
    """labels: int64, the class of each sample of the set."""
    before = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=classes))])
    shards = all_shards(ranks, classes)
    most = max(int(before[shard.stop] - before[shard.start]) for shard in shards)
    return Sizes(classes=classes, samples=len(labels), ranks=ranks, own_classes=shards[0].size, own_samples=most)


def plan(config: RunConfig, sizes: Sizes, *, cuda: bool) -> Plan:
    """All rows. cuda: whether ranks train on GPUs. Raises ConfigError for a backbone that is not known."""
    parameters, buffers = _counts(config)
    backbone, optimizer = 4 * parameters + buffers, 4 * parameters * _moments(config)
    rows = [
        Row(name="backbone: weights and statistics", bytes=backbone),
        Row(name="backbone: gradients", bytes=4 * parameters),
        Row(name="backbone: optimizer", bytes=optimizer),
    ]
    if config.train.precision != "fp32":
        name = f"backbone: weights in {config.train.precision}"
        rows.append(Row(name=name, bytes=2 * parameters, at_a_time=True))
    centres, moments = _centres(config, sizes.own_classes)
    rows += [
        Row(name="class centres", bytes=centres),
        Row(name="class centres: optimizer", bytes=moments),
        *_head(config, sizes, cuda=cuda),
    ]
    saved = backbone + optimizer + sum(_centres(config, sizes.classes))
    copied = backbone + optimizer + centres + moments
    if config.clustering.enabled:
        rows += _clusters(config, sizes)
        saved += _saved_clusters(config, sizes, sizes.classes, sizes.samples)
        copied += _saved_clusters(config, sizes, sizes.own_classes, sizes.own_samples)
    rows.append(Row(name="copy of the rank's part of a checkpoint, kept", bytes=copied, place="host"))
    batch_size, _ = config.train.share(sizes.ranks)
    images = (config.data.prefetch + 2) * batch_size * (_PIXELS + 16)
    rows.append(Row(name="images decoded ahead", bytes=images, place="host"))
    rows.append(Row(name="classes of all samples", bytes=8 * sizes.samples, place="host"))
    return Plan(rows=tuple(rows), checkpoint=saved)


def _counts(config: RunConfig) -> tuple[int, int]:
    """Parameters of the backbone, and bytes of its buffers. No memory is taken for them."""
    try:
        with torch.device("meta"):
            backbone = build_backbone(config.model.backbone, embedding_size=config.model.embedding_size)
    except ValueError as error:
        raise ConfigError(f"model.backbone: {error}") from None
    return (
        sum(p.numel() for p in backbone.parameters()),
        sum(buffer.numel() * buffer.element_size() for buffer in backbone.buffers()),
    )


def _moments(config: RunConfig) -> int:
    """State tensors of the backbone's optimizer."""
    if config.optim.name == "adamw":
        return 2
    return int(config.optim.momentum > 0)


def _centres(config: RunConfig, classes: int) -> tuple[int, int]:
    """Bytes of class centres and of their optimizer's state."""
    rows = classes * config.head.subcentres
    one = rows * config.model.embedding_size * (2 if config.head.centre_dtype == "bf16" else 4)
    if config.optim.name == "adamw":
        return one, 2 * one + 4 * rows
    return one, one + (4 * rows if config.head.missed_steps == "catch_up" else 0)


def _head(config: RunConfig, sizes: Sizes, *, cuda: bool) -> list[Row]:
    """What a step of the head takes: bounds."""
    batch_size, _ = config.train.share(sizes.ranks)
    rows = batch_size * sizes.ranks
    D, own = config.model.embedding_size, sizes.own_classes * config.head.subcentres
    most = 4 * rows * own  # no tile is larger than everything
    pixels = batch_size * _PIXELS * (1 + 4)  # as they come, and as numbers
    tiles = min(_HEAD_TILES["cuda" if cuda else "cpu"], 3 * max(most, 4 * own * D))
    return [
        Row(name="logits of the head, in tiles", bytes=tiles, at_a_time=True),
        Row(name="cosines kept for the optimizer", bytes=min(_HEAD_KEPT, most), at_a_time=True),
        Row(name="embeddings of the global batch", bytes=4 * 4 * rows * D, at_a_time=True),
        Row(name="images of a micro-batch", bytes=pixels, at_a_time=True),
    ]


def _clusters(config: RunConfig, sizes: Sizes) -> list[Row]:
    """The cluster service: bank, the version in use, and a refresh beside it that ends in the next version."""
    D, R, P, N, C = (
        config.model.embedding_size, sizes.own_classes, sizes.own_samples, sizes.samples, sizes.classes
    )  # fmt: skip
    K = config.clustering.num_clusters(C)
    S = -(-K // sizes.ranks)
    version = 4 * D * (S + R) + 4 * N + 20 * K + 28 * R + 4 * C * config.clustering.hard_negatives
    shown = 4 * D * S if sizes.ranks > 1 else 0
    run = 4 * D * S + shown + 8 * D * S + 8 * K + 18 * P
    publication = 4 * D * 2 * R + 4 * N + 8 * K + 64 * R
    return [
        Row(name="embedding bank", bytes=(2 * D + 1) * (P + 1) + 16 * P + 4 * N),
        Row(name="clusters in use", bytes=version),
        Row(name="refresh: copy of the bank", bytes=(2 * D + 1) * P, at_a_time=True),
        Row(name="refresh: k-means", bytes=run, at_a_time=True),
        Row(name="refresh: the next version", bytes=publication + version, at_a_time=True),
    ]


def _saved_clusters(config: RunConfig, sizes: Sizes, classes: int, samples: int) -> int:
    """Bytes of the cluster service in a checkpoint, with a refresh under way, of so many classes and samples."""
    D, C = config.model.embedding_size, sizes.classes
    K = config.clustering.num_clusters(C)
    clusters = -(-K * classes // C)
    bank = (2 * D + 1) * samples
    version = 4 * D * (clusters + classes) + 28 * classes
    whole = 4 * sizes.samples + 20 * K + 4 * C * config.clustering.hard_negatives
    refresh = 2 * D * samples + 18 * samples + 4 * D * clusters
    return bank + version + whole + refresh


def device_memory(found: Plan, free: Sequence[int]) -> Finding:
    """Against free bytes of each GPU that is used."""
    least, wanted = min(free), found.total("device")
    return _judged("GPU memory plan", wanted, least, "of a GPU", "the images' activations come on top")


def host_memory(found: Plan, free: int, local_ranks: int, *, cuda: bool) -> Finding:
    """Against free bytes of the host, which all its ranks share. cuda: whether ranks train on GPUs."""
    each = found.total("host") + (0 if cuda else found.total("device"))
    more = "programs and file cache come on top" if cuda else "programs and the images' activations come on top"
    return _judged("host memory plan", each * local_ranks, free, f"of the host, for {local_ranks} rank(s)", more)


def _judged(name: str, wanted: int, free: int, whose: str, more: str) -> Finding:
    text = f"{size_text(wanted)} counted, {size_text(free)} free {whose}; {more}"
    cure = "smaller train.batch_size, head.centre_dtype=bf16, or more ranks, which split centres and bank"
    if wanted > free:
        return Finding(name, "fail", f"expected room for what is counted: {text}", cure)
    if wanted > _TIGHT * free:
        return Finding(name, "warn", f"tight: {text}", cure)
    return Finding(name, "pass", text)
