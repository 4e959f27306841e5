"""Memory of a rank by part, and when each part is there: what must fit at the fullest moment of a step.

What has a known size is counted from tensors (`state`, `counting`); what a tile, a slice or a library takes follows
from the code that takes it, named beside each formula, or is assumed and marked so.

Legend: as in `state`; B images of a micro-batch, N = B W rows of the global one, t classes of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from backbones import IMAGE_SIZE
from clustering.service import seeds
from clustering.service.schedule import points_at_once
from configs.schema import ConfigError, RunConfig
from partial_fc.tiles import KEPT_BYTES, TILE_BYTES
from training.plan import state
from training.plan.counting import Pass, backbone_pass
from training.plan.devices import Device
from training.plan.state import Sizes

Moment = Literal["backbone", "head", "update", "refresh"]
MOMENTS: tuple[Moment, ...] = ("backbone", "head", "update", "refresh")
"""Forward and backward of the backbone, the losses, the optimizers, and a slice of the refresh of the clusters."""
_CONTEXT = 600 << 20
"""Assumed: CUDA's context, the libraries' own, and workspaces of cuBLAS and cuDNN."""
_CPU_LIBRARIES = 40 << 20
"""Of a CPU's process: oneDNN's programs for each shape, and what malloc keeps; the median of the rows of
benchmarks/results/planner_* that factors are fitted to."""
_NCCL = 400 << 20
"""Assumed, with more than one rank."""
_PROGRAM = 600 << 20
"""Assumed, of the host's memory for each rank."""
_UNUSED = 0.05
"""Assumed: of what comes and goes, the share that the caching allocator holds in pieces that fit nothing."""
_ADDED_AT_ONCE = 65536
"""Rows of `clustering.service.shards.add_rows_`."""
_CHUNK = 32 << 20
"""Bytes of centres that the Triton kernels walk through at a time (`partial_fc.kernel_parts`)."""
_CONTRAST = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Numbers of a tile of the contrastive loss (`clustering.step.plain`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Something that takes memory on a rank's device."""

    name: str
    bytes: int
    when: tuple[Moment, ...] = MOMENTS
    assumed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """rows: on a rank's device. host: bytes of a rank on its host; on CPUs they come on top of the others."""

    rows: tuple[Row, ...]
    host: tuple[tuple[str, int], ...]

    def at(self, moment: Moment) -> int:
        """Bytes in use then."""
        return sum(row.bytes for row in self.rows if moment in row.when)

    @property
    def fullest(self) -> Moment:
        return max(MOMENTS, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.fullest)

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        return sum(row.bytes for row in self.rows if row.when == MOMENTS)


def pass_of(config: RunConfig, batch: int) -> Pass:
    """`counting.backbone_pass` with a run's settings. Raises ConfigError for a backbone that cannot be counted."""
    try:
        return backbone_pass(
            config.model.backbone,
            embedding_size=config.model.embedding_size,
            recompute=config.model.recompute,
            batch=batch,
            precision=config.train.precision,
        )
    except ValueError as error:
        raise ConfigError(f"model.backbone: {error}") from None


def tile_classes(config: RunConfig, rows: int, *, cuda: bool) -> int:
    """t: as `SoftmaxSettings.tile` has it."""
    wider = max(rows, config.model.embedding_size)
    return max(64, TILE_BYTES["cuda" if cuda else "cpu"] // (4 * wider * config.head.subcentres))


def taking_part(config: RunConfig, sizes: Sizes, rows: int) -> int:
    """Classes of the rank in a step: those drawn, and a place for every class that the batch may name.

    Places that stay empty are padding, which is multiplied like the others (`partial_fc.sampling.sample_rows`): nobody
    waits to know how many there are.
    """
    head, clusters = config.head, config.clustering
    if head.sample_rate >= 1:
        return sizes.own_classes
    named = rows * (1 + (clusters.hard_negatives if clusters.enabled else 0))
    return min(sizes.own_classes, round(head.sample_rate * sizes.own_classes) + named)


def by_triton(config: RunConfig, device: Device) -> bool:
    """Whether the head's kernels run (`partial_fc.kernels.why_not`)."""
    head = config.head
    fits = head.subcentres == 1 and config.model.embedding_size <= 512 and device.triton
    return device.cuda and fits and head.impl in ("auto", "triton")


def contrast_by_triton(config: RunConfig, device: Device) -> bool:
    """Whether the contrastive loss is computed by that of them that the head's forward pass has."""
    return device.cuda and device.triton and config.model.embedding_size <= 512 and config.train.precision == "bf16"


def memory_of(config: RunConfig, sizes: Sizes, device: Device) -> Memory:
    """Memory of the rank that holds most. Raises ConfigError for a backbone that is not known, or a batch that ranks
    cannot share out."""
    batch, _ = config.train.share(sizes.ranks)
    rows = [*_backbone(config, sizes, batch, cuda=device.cuda), *_head(config, sizes, batch, device)]
    if config.clustering.enabled:
        rows += _clusters(config, sizes, batch, device)
    rows = [row for row in rows if row.bytes]
    if not device.cuda:
        rows.append(Row(name="libraries' own", bytes=_CPU_LIBRARIES))
    else:
        coming = Memory(rows=tuple(rows), host=())
        unused = round(_UNUSED * (coming.peak - coming.held))
        rows += [
            Row(name="allocator: pieces that fit nothing", bytes=unused, assumed=True),
            Row(name="CUDA context and libraries", bytes=_CONTEXT, assumed=True),
        ]
        if sizes.ranks > 1:
            rows.append(Row(name="NCCL", bytes=_NCCL, assumed=True))
    return Memory(rows=tuple(rows), host=tuple(_host(config, sizes, batch)))


def _backbone(config: RunConfig, sizes: Sizes, batch: int, *, cuda: bool) -> Iterator[Row]:
    net, once, inside = state.backbone_of(config), pass_of(config, batch), state.copy_ranks(config, sizes)
    own = -(-4 * net.parameters // inside)
    yield Row(name="backbone: weights and statistics", bytes=own + net.buffers)
    yield Row(name="backbone: statistics of the step before", bytes=net.buffers)  # training.undo
    yield Row(name="backbone: gradients" + ", in DDP's buckets" * (inside == 1), bytes=own)
    yield Row(name="backbone: optimizer", bytes=own * state.backbone_moments(config))
    if inside > 1:  # the next block is on its way while one runs; its gradient is whole until it is scattered
        yield Row(name="backbone: gathered, until backward", bytes=4 * net.whole, when=("backbone", "head"))
        yield Row(name="backbone: gathered blocks", bytes=3 * 4 * net.block, when=("backbone",))
    graph = config.model.graph  # which keeps the memory of all that it computes
    yield Row(name="backbone: activations kept", bytes=once.kept, when=MOMENTS if graph else ("backbone", "head"))
    yield Row(name="backbone: at a time", bytes=once.peak - once.kept, when=MOMENTS if graph else ("backbone",))
    if graph:
        yield Row(
            name="backbone: gradients and images of the graphs", bytes=own + batch * 4 * 3 * math.prod(IMAGE_SIZE)
        )
    yield Row(name="images of a micro-batch", bytes=batch * state.IMAGE_BYTES)
    if not cuda:  # torch's loop over parameters adds decay to a copy of each gradient; a GPU's optimizer is one kernel
        yield Row(name="backbone: optimizer at a time", bytes=-(-4 * net.largest // inside), when=("update",))


def _head(config: RunConfig, sizes: Sizes, batch: int, device: Device) -> Iterator[Row]:
    D, K = config.model.embedding_size, config.head.subcentres
    N = batch * sizes.ranks
    centres, moments = state.centre_bytes(config, sizes.own_classes)
    yield Row(name="class centres", bytes=centres)
    yield Row(name="class centres: optimizer", bytes=moments)
    # Packed rows and their parts; x, its gradient, and that of the raw rows. What waits for the optimizer keeps x.
    yield Row(name="gathered batch", bytes=N * (4 * D + 20) * (3 if sizes.ranks > 1 else 1), when=("head",))
    yield Row(name="gathered batch, until the update", bytes=4 * N * D + 40 * N, when=("backbone", "head", "update"))
    yield Row(name="targets in float64", bytes=4 * 8 * N * D * K, when=("head",))
    S = taking_part(config, sizes, N)
    if by_triton(config, device):
        yield from _kernels(config, S, N)
    else:
        yield from _tiles(config, S, N, cuda=device.cuda)
    if config.head.sample_rate < 1:
        yield Row(name="drawing of classes", bytes=4 * 8 * sizes.own_classes, when=("head",))


def _kernels(config: RunConfig, S: int, N: int) -> Iterator[Row]:
    """One chunk: unit centres, and in the update its sums in float32; partial sums of the forward pass."""
    chunk, partial = _forward_kernel(config, S, N)
    unit = min(_CHUNK, chunk)
    yield Row(name="head: a chunk of centres", bytes=chunk, when=("head",))
    yield Row(name="head: partial sums", bytes=partial, when=("head",))
    yield Row(name="head: a chunk of centres in the update", bytes=unit, when=("update",))
    yield Row(name="head: its sums", bytes=unit * (2 if config.train.precision == "bf16" else 1), when=("update",))


def _forward_kernel(config: RunConfig, S: int, N: int) -> tuple[int, int]:
    """A chunk of unit centres, and partial sums (`partial_fc.kernel_forward`, on an H100's 132 cores)."""
    D = 1 << max(4, (config.model.embedding_size - 1).bit_length())
    blocks = -(-N // 64)
    splits = max(1, min(-(-2 * 132 // blocks), S // 128))
    chunk = max(1, 8 // blocks) * _CHUNK
    return min(chunk, S * D * (2 if config.train.precision == "bf16" else 4)), 4 * splits * N * (D + 1)


def _tiles(config: RunConfig, S: int, N: int, *, cuda: bool) -> Iterator[Row]:
    """torch's tiles.

    Numbers of logits, with K sub-centres the best one's place (int64) and a spread copy as well; copies of rows where
    they do not lie together or are not float32, of which the next tile's are made before the last one's are gone;
    AdamW's gradient, which SGD adds to its momentum at once.
    """
    D, K = config.model.embedding_size, config.head.subcentres
    t = tile_classes(config, N, cuda=cuda)
    first, second = min(t, S), min(t, max(0, S - t))
    kept = min(KEPT_BYTES, 4 * N * K * S)
    yield Row(name="head: cosines kept for the update", bytes=kept, when=("backbone", "head", "update"))
    logits = 4 * N * first * (2 if K == 1 else 4 + 2 * K)
    yield Row(name="head: tiles of logits", bytes=logits, when=("head", "update"))
    if config.optim.name == "adamw":
        yield Row(name="head: gradient of a tile", bytes=4 * first * K * D, when=("update",))
    copied = config.head.sample_rate < 1 or config.head.centre_dtype == "bf16"
    if copied:
        both = 4 * (first + second) * D * K
        moments = 2 if config.optim.name == "adamw" else 1
        yield Row(name="head: copies of a tile's centres", bytes=both, when=("head",))
        yield Row(name="head: copies of centres and moments", bytes=both * (1 + moments), when=("update",))
        if config.head.centre_dtype == "bf16":  # lots are int64, and several of them are there while they are made
            yield Row(name="head: lots of a tile", bytes=3 * 8 * first * D * K, when=("update",))


def _clusters(config: RunConfig, sizes: Sizes, batch: int, device: Device) -> Iterator[Row]:
    """The service, at its fullest: a version in use, and a refresh that ends in the next one."""
    D, C, R = config.model.embedding_size, sizes.classes, sizes.own_classes
    N, P = batch * sizes.ranks, sizes.own_samples
    K, S = config.clustering.num_clusters(C), state.clusters_of_rank(config, sizes)
    version = state.version_bytes(config, sizes) + state.pulled_bytes(config, sizes)
    yield Row(name="embedding bank", bytes=state.bank_bytes(config, sizes))
    yield Row(name="clusters in use", bytes=version)
    yield Row(name="refresh: snapshot of the bank", bytes=state.snapshot_bytes(config, sizes))
    yield Row(name="refresh: k-means", bytes=state.kmeans_bytes(config, sizes))
    yield Row(name="refresh: publication", bytes=state.publication_bytes(config, sizes))
    if contrast_by_triton(config, device):
        forward = sum(_forward_kernel(config, S, N))
        yield Row(name="contrastive loss: a chunk, sums", bytes=forward + 5 * 4 * N * D, when=("head",))
    else:
        tile = min(_CONTRAST["cuda" if device.cuda else "cpu"], N * max(64, S))
        yield Row(name="contrastive loss: a tile", bytes=2 * 4 * tile + 5 * 4 * N * D, when=("head",))
    # Kept from slice to slice while points are compared, and put away before the others.
    operand = 2 * D * S if device.cuda else 0
    yield Row(name="refresh: centres as products take them", bytes=operand, when=("backbone", "head", "update"))
    # The slice of a refresh that takes most: points that are compared, in float32, sorted, and in bf16; rows that are
    # added to sums, copied, in float64 and squared; clusters, samples and candidates where empty clusters are seeded;
    # new centres in float64; or numbers of all classes.
    compared = operand + 10 * D * min(points_at_once(S, torch.device("cuda")), P) if device.cuda else 0
    added = 18 * D * min(_ADDED_AT_ONCE, P)
    new = 32 * D * S
    levels = 16 * D * R + 8 * 20 * C
    slices = {
        "points compared": compared,
        "rows added": added,
        "empty clusters seeded": _seeding(P, R, K),
        "new centres": new,
        "hard levels": levels,
    }
    most = max(slices, key=slices.__getitem__)
    yield Row(name=f"refresh: a slice, {most}", bytes=slices[most], when=("refresh",))


def _seeding(P: int, R: int, K: int) -> int:
    """Most of what comes and goes in `KMeansRun._seed`, one after the other: members of all clusters are counted; the
    worst sample of each class is found by sorting; counts by level are added up and the candidates sorted by them; and
    empty clusters are looked for."""
    some, L = min(K, seeds.CLUSTERS_AT_ONCE), seeds.LEVELS
    return max(8 * K + 8 * P, 49 * P, 16 * L + 16 * R, 8 * L + 52 * R, 9 * some + 16 * R)


def _host(config: RunConfig, sizes: Sizes, batch: int) -> Iterator[tuple[str, int]]:
    _, copied = state.checkpoint_bytes(config, sizes)
    yield "copy of the rank's part of a checkpoint, kept", copied
    yield "images decoded ahead", state.images_ahead_bytes(config, batch)
    yield "classes of all samples", 8 * sizes.samples
    yield "Python, torch and CUDA's libraries", _PROGRAM
