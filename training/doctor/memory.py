"""Bytes of a run, counted from its settings: what lies on each rank's device, on the host, and in a checkpoint.

Counted is what has a known size (`training.plan.state`). Activations of the backbone, workspaces of libraries, what an
allocator leaves unused and blocks that `model.shard` gathers are not: `python -m training plan` plans those as well.
Shards are of unequal size by one class; the rank with the most samples is counted.

Legend: D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import RunConfig
from partial_fc.tiles import KEPT_BYTES, TILE_BYTES
from training.doctor.finding import Finding, size_text
from training.plan import state
from training.plan.state import Sizes, sizes_of

__all__ = ["Plan", "Row", "Sizes", "device_memory", "host_memory", "plan", "sizes_of"]

Place = Literal["device", "host"]
_TIGHT = 0.7
"""Share of the memory from which on activations may not find room."""


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


def plan(config: RunConfig, sizes: Sizes, *, cuda: bool) -> Plan:
    """All rows. cuda: whether ranks train on GPUs. Raises ConfigError for a backbone that is not known."""
    net = state.backbone_of(config)
    own = -(-4 * net.parameters // state.copy_ranks(config, sizes))
    rows = [
        Row(name="backbone: weights and statistics", bytes=own + net.buffers),
        Row(name="backbone: gradients", bytes=own),
        Row(name="backbone: optimizer", bytes=own * state.backbone_moments(config)),
    ]
    if config.train.precision != "fp32":
        name = f"backbone: weights in {config.train.precision}"
        rows.append(Row(name=name, bytes=2 * net.parameters, at_a_time=True))
    centres, moments = state.centre_bytes(config, sizes.own_classes)
    rows += [
        Row(name="class centres", bytes=centres),
        Row(name="class centres: optimizer", bytes=moments),
        *_head(config, sizes, cuda=cuda),
    ]
    if config.clustering.enabled:
        rows += _clusters(config, sizes)
    saved, copied = state.checkpoint_bytes(config, sizes)
    rows.append(Row(name="copy of the rank's part of a checkpoint, kept", bytes=copied, place="host"))
    batch_size, _ = config.train.share(sizes.ranks)
    images = state.images_ahead_bytes(config, batch_size)
    rows.append(Row(name="images decoded ahead", bytes=images, place="host"))
    rows.append(Row(name="classes of all samples", bytes=8 * sizes.samples, place="host"))
    return Plan(rows=tuple(rows), checkpoint=saved)


def _head(config: RunConfig, sizes: Sizes, *, cuda: bool) -> list[Row]:
    """What a step of the head takes: bounds."""
    batch_size, _ = config.train.share(sizes.ranks)
    rows = batch_size * sizes.ranks
    D, own = config.model.embedding_size, sizes.own_classes * config.head.subcentres
    most = 4 * rows * own  # no tile is larger than everything
    pixels = batch_size * state.PIXELS * (1 + 4)  # as they come, and as numbers
    # Logits, centres and gradient of a tile.
    tiles = 3 * min(TILE_BYTES["cuda" if cuda else "cpu"], max(most, 4 * own * D))
    return [
        Row(name="logits of the head, in tiles", bytes=tiles, at_a_time=True),
        Row(name="cosines kept for the optimizer", bytes=min(KEPT_BYTES, most), at_a_time=True),
        Row(name="embeddings of the global batch", bytes=4 * 4 * rows * D, at_a_time=True),
        Row(name="images of a micro-batch", bytes=pixels, at_a_time=True),
    ]


def _clusters(config: RunConfig, sizes: Sizes) -> list[Row]:
    """The cluster service: bank, the version in use, and a refresh beside it that ends in the next version."""
    return [
        Row(name="embedding bank", bytes=state.bank_bytes(config, sizes)),
        Row(name="clusters in use", bytes=state.version_bytes(config, sizes) + state.pulled_bytes(config, sizes)),
        Row(name="refresh: copy of the bank", bytes=state.snapshot_bytes(config, sizes), at_a_time=True),
        Row(name="refresh: k-means", bytes=state.kmeans_bytes(config, sizes), at_a_time=True),
        Row(name="refresh: the next version", bytes=state.publication_bytes(config, sizes), at_a_time=True),
    ]


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
