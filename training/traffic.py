"""What a training step sends between ranks: every collective, its bytes and how often, from the settings alone.

The table "Collectives of a step" of docs/architecture.md as a function; `tests/dist/test_traffic.py` holds it to what
steps really run. Refreshes of the clusters, log lines, evaluations and checkpoints come on top, between steps.

Legend: B images of a rank's micro-batch, W ranks, N = W x B, D embedding size, P parameters of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from backbones import Backbone
from configs.schema import ConfigError, RunConfig
from training.sharded_units import shard_ranks, units_of

OVER_HOSTS = "gradients over hosts"
"""What a rank sends those of the same place on other hosts: all ranks of a host do so at once, over one link."""
Kind = Literal["all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast", "reduce"]
"""The last two run between steps only (`training.plan.traffic`)."""

_FLOAT = 4
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20
"""DistributedDataParallel's: it sends gradients once so many bytes of them are there."""


class Collective(NamedTuple):
    """Collectives of one kind that a step, or a refresh of the clusters, runs for one purpose."""

    what: str
    kind: Kind
    bytes: int
    """Of all of them together: what a gather hands to every rank, what every rank hands to the others."""
    times: int
    """Calls in it."""
    ranks: int
    """That take part in each."""

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in it where the ranks stand in a ring, as NCCL's do: as many as it receives. Of
        broadcasts and reduces, what each passes on.

        In a ring over several hosts each host's link carries as much, once out and once in.
        """
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks


def step_traffic(config: RunConfig, backbone: Backbone, *, ranks: int, host_ranks: int = 0) -> list[Collective]:
    """The collectives of one optimizer step on `ranks` ranks, with the cluster losses if there are clusters.

    backbone: that of the run, whole; only its shapes are read, so it may be on the meta device. host_ranks: ranks of a
    host, for `model.shard=host`; 0: all are on one. Runs no collective. Raises ConfigError where the ranks cannot share
    out the batch, or cannot be cut by hosts.
    """
    if ranks == 1:
        return []
    B, accumulation = config.train.share(ranks)
    found = [*_head(config, B * ranks, ranks, accumulation)]
    inside = shard_ranks(config.model.shard, ranks, host_ranks)
    found += _whole(backbone, ranks) if inside == 1 else _sharded(backbone, inside, ranks // inside, accumulation)
    found.append(Collective("whether to stop", "all_reduce", _FLOAT, 1, ranks))
    return found


def _head(config: RunConfig, N: int, ranks: int, accumulation: int) -> Iterable[Collective]:
    """Once for each micro-batch."""
    D, bf16 = config.model.embedding_size, config.head.wire_dtype == "bf16"
    wire = 2 if bf16 else _FLOAT

    def each(what: str, kind: Kind, nbytes: int) -> Collective:
        return Collective(what, kind, accumulation * nbytes, accumulation, ranks)

    yield each("embeddings, lengths, labels, ids", "all_gather", N * (wire * D + 20))
    if config.head.loss == "curricularface":
        yield each("targets' cosines and logits", "all_reduce", 8 * N)
    yield each("sums of the softmax", "all_reduce", 16 * N)
    if config.clustering.enabled:
        yield each("sums of the contrastive loss", "all_reduce", 8 * N)
        yield each("alignment loss", "all_reduce", _FLOAT)
    back: Kind = "all_to_all" if bf16 else "reduce_scatter"
    yield each("gradients of embeddings and lengths", back, N * (wire * D + 4))


def _whole(backbone: nn.Module, ranks: int) -> Iterable[Collective]:
    """DistributedDataParallel's buckets, once a step: gradients come from the last parameter to the first."""
    sizes = [_FLOAT * p.numel() for p in backbone.parameters() if p.requires_grad][::-1]
    buckets, held, limit = 0, 0, _FIRST_BUCKET
    for size in sizes:
        held += size
        if held >= limit:
            buckets, held, limit = buckets + 1, 0, _BUCKET
    yield Collective("gradients of the backbone", "all_reduce", sum(sizes), buckets + (held > 0), ranks)


def _sharded(backbone: Backbone, inside: int, hosts: int, accumulation: int) -> Iterable[Collective]:
    """inside: ranks that share out one copy of the backbone."""
    units = units_of(backbone)
    gathered = scattered = gathers = 0
    for unit in units:
        times = accumulation * (1 if unit.kept else 2)  # for forward, and unless it stays, again for backward
        gathers += times
        gathered += times * _padded(unit.parameters, inside)
        scattered += _padded([p for p in unit.parameters if p.requires_grad], inside)
    scatters = sum(any(p.requires_grad for p in unit.parameters) for unit in units)
    ranks = inside * hosts
    yield Collective("weights of the backbone", "all_gather", gathered, gathers, inside)
    yield Collective(
        "gradients of the backbone", "reduce_scatter", accumulation * scattered, accumulation * scatters, inside
    )
    if hosts > 1:
        yield Collective(OVER_HOSTS, "all_reduce", scattered // inside, scatters, hosts)
    trained = sum(p.requires_grad for p in backbone.parameters())
    yield Collective("squares of the gradients", "all_reduce", 8 * trained, 1, ranks)


def _padded(parameters: Sequence[nn.Parameter], ranks: int) -> int:
    """Bytes of float32 parameters, the rows of each filled up to a multiple of the ranks. Raises ConfigError."""
    if not all(p.dim() for p in parameters):
        raise ConfigError(
            "model.shard: expected a backbone whose weights have rows, got one that is a single number: use --set "
            "model.shard=none"
        )
    return _FLOAT * sum(-(-len(p) // ranks) * ranks * math.prod(p.shape[1:]) for p in parameters)
