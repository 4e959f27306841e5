"""Collectives of a refresh of the clusters: what is called, how often, and with how many bytes.

Those of a step are in `training.traffic`. Bytes of a call are those of its whole tensor: that of an all-reduce, a
broadcast or a reduce, and of a reduce-scatter what every rank hands in.

Legend: D embedding size, C classes, K clusters, W ranks, k hard negatives of a class.
"""

from __future__ import annotations

from collections.abc import Iterator

from clustering.service import seeds
from configs.schema import RunConfig
from training.plan.counting import meta_backbone
from training.plan.state import Sizes
from training.traffic import OVER_HOSTS, Collective, step_traffic

OF_CLUSTER_LOSSES = ("sums of the contrastive loss", "alignment loss")
OF_BACKBONE = ("gradients of the backbone", OVER_HOSTS, "weights of the backbone")
"""Those that travel while the backbone is at work."""
UNWAITED = ("whether to stop",)
"""Its result is read steps later. All three as `training.traffic` calls them."""


def of_step(config: RunConfig, sizes: Sizes) -> list[Collective]:
    """Of one optimizer step, with the cluster losses if there are clusters."""
    backbone = meta_backbone(config.model.backbone, embedding_size=config.model.embedding_size)
    return step_traffic(config, backbone, ranks=sizes.ranks, host_ranks=sizes.host_ranks)


def of_refresh(
    config: RunConfig, sizes: Sizes, *, first: bool = True, rounds: int = 3, empty: int | None = None
) -> list[Collective]:
    """Of one refresh, from its start to its publication.

    first: k-means starts from means. rounds: of the matching of classes and clusters; few on data of faces. empty:
    clusters without a sample at the seeding of every iteration; None: of a first refresh the extra ones at first, and
    none later.
    """
    return list(_of_refresh(config, sizes, first, rounds, empty)) if sizes.ranks > 1 else []


def _of_refresh(config: RunConfig, sizes: Sizes, first: bool, rounds: int, empty: int | None) -> Iterator[Collective]:
    c, D, C, W = config.clustering, config.model.embedding_size, sizes.classes, sizes.ranks
    K, k, turns = c.num_clusters(C), c.hard_negatives, c.iterations
    owning = min(W, K)  # ranks that have clusters: the others show nothing

    def summed(what: str, size: int, times: int) -> Collective:
        return Collective(what, "all_reduce", size, times, W)

    yield summed("agreement at start and end", 2 * 24, 2)
    shown, means = turns + 1, turns + first + c.own_centres
    yield Collective("centres", "broadcast", shown * 4 * D * K, shown * owning, W)
    yield Collective("sums of the means", "reduce", means * 8 * D * K, means * owning, W)
    counted = turns * (1 + c.noise_gate)  # samples of clusters; with the gate their largest classes
    yield summed("counts of k-means", counted * 8 * K, counted)
    seedings = [K - C if first else 0] if empty is None else [empty] * turns
    seeded = sum(wanted > 0 for wanted in seedings)
    if seeded:
        times, levels = seeds.exchanges(W)
        yield summed("levels of seeds", seeded * 4 * times * levels, seeded)
        yield Collective("levels of seeds", "reduce_scatter", seeded * 4 * times * levels * W, seeded * times, W)
    yield summed("sizes and classes of clusters", 2 * 8 * K, 2)
    yield summed("hard levels", 40 * C + 16, 2)
    yield summed("matching", (2 * rounds + 1) * 8 * K, 2 * rounds + 1)
    yield summed("cluster of every sample", 4 * sizes.samples + 8, 2)
    yield summed("weights of clusters", 8 * K, 1)
    if k:
        yield Collective("anchors", "broadcast", 4 * D * C, min(W, C), W)
    yield summed("neighbours", 4 * C * k, 1)
