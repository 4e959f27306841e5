"""Arithmetic and bytes of the parts of a step, and of a refresh of the clusters: what `rates` turns into seconds.

Legend: as in `memory`; S classes of the rank that take part, A micro-batches of a step, P samples of the rank.
"""

from __future__ import annotations

from typing import Literal

from configs.schema import RunConfig
from partial_fc.tiles import KEPT_BYTES
from training.plan.devices import Device
from training.plan.memory import by_triton, contrast_by_triton, pass_of, taking_part
from training.plan.state import Sizes, backbone_of, clusters_of_rank

Resource = Literal["convolution", "product", "head", "contrast", "kmeans", "logit", "draw", "moved", "call"]
Work = dict[Resource, float]
"""convolution, product: flops of the backbone. head, contrast, kmeans: of their matrix products. logit: numbers that go
through exp() and what is around it. draw: classes of whom some are drawn. moved: bytes to and from memory, of what is
none of these. call: operators, which a host has to launch."""


def of_backbone(config: RunConfig, sizes: Sizes) -> Work:
    """Forward and backward of all micro-batches."""
    batch, accumulation = config.train.share(sizes.ranks)
    once = pass_of(config, batch)
    found: Work = {"convolution": once.convolutions, "product": once.products, "moved": once.moved, "call": once.calls}
    return {name: accumulation * amount for name, amount in found.items()}


def of_head(config: RunConfig, sizes: Sizes, device: Device) -> tuple[Work, Work]:
    """Loss with the embeddings' gradient; and the centres' gradient with their update.

    Products are two forward, and one or two in the update: cosines that were kept need not be made again.
    """
    batch, A = config.train.share(sizes.ranks)
    D, K, N = config.model.embedding_size, config.head.subcentres, batch * sizes.ranks
    S = taking_part(config, sizes, N) * K
    product, logits, numbers = 2.0 * A * N * S * D, float(A * N * S), float(S * D)
    each = 2 if config.head.centre_dtype == "bf16" else 4
    tensors = 3 if config.optim.name == "adamw" else 2
    sampled = config.head.sample_rate < 1
    forward: Work = {"head": 2 * product}
    update: Work = {}
    if by_triton(config, device):  # exp() is hidden behind the products
        forward["moved"] = A * each * numbers
        update = {"head": 2 * product, "moved": (1 + 2 * tensors) * each * numbers}
    else:
        copied = 8 * numbers if sampled or each == 2 else 0.0  # a tile's rows, to where they lie together in float32
        forward |= {"logit": logits, "moved": A * (each * numbers + copied)}
        kept = min(1.0, KEPT_BYTES / (4 * logits)) if logits else 1.0
        rounding = (230 + 72 * tensors) * numbers if each == 2 else 0.0  # partial_fc.rounding: lots in int64, then bits
        update = {
            "head": (2 - kept) * product,
            "logit": logits,
            "moved": 36 * numbers + 2 * tensors * copied + rounding,
        }
    if sampled:
        forward["draw"] = float(A * sizes.own_classes)
    return forward, update


def of_optimizer(config: RunConfig, device: Device) -> Work:
    """The backbone's: gradients go to buckets, are measured, clipped and applied."""
    tensors = 1 + (2 if config.optim.name == "adamw" else 1)
    each = 20 + 4 * (1 + 2 * tensors) if device.cuda else 20 + 12 * (1 + tensors)
    return {"moved": float(each * backbone_of(config).parameters)}


def of_cluster_losses(config: RunConfig, sizes: Sizes, device: Device) -> Work:
    """The contrastive loss with its gradient; the alignment loss, and the bank's rows, are some rows of the batch."""
    if not config.clustering.enabled:
        return {}
    batch, A = config.train.share(sizes.ranks)
    D, N = config.model.embedding_size, batch * sizes.ranks
    S = clusters_of_rank(config, sizes)
    product, moved = 4.0 * A * N * S * D, A * (4.0 * D * S + 60.0 * N * D)
    if contrast_by_triton(config, device):
        return {"head": product, "moved": moved}
    return {"contrast": product, "logit": float(A * N * S), "moved": moved}


def of_refresh(config: RunConfig, sizes: Sizes) -> Work:
    """A whole one: comparisons of all the rank's samples with all clusters, and sums of samples."""
    if not config.clustering.enabled:
        return {}
    D, P = config.model.embedding_size, sizes.own_samples
    K, S = config.clustering.num_clusters(sizes.classes), clusters_of_rank(config, sizes)
    turns, own = config.clustering.iterations, config.clustering.own_centres
    # Rows are copied, turned into whole numbers and added; in the first and the last pass for means and cohesion, and
    # once more for centres of their owners' samples.
    return {
        "kmeans": 2.0 * turns * P * K * D,
        "moved": (turns + 2 + own) * 26.0 * P * D + (turns + own) * 80.0 * S * D + 60.0 * sizes.classes,
    }
