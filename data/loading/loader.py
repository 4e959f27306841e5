"""Choice and construction of a loader."""

from __future__ import annotations

import logging

import torch

from configs.augment import AugmentConfig
from configs.data import Backend, Sampler
from data.loading.base_loader import RecordLoader
from data.loading.batch import ImageSource, Loader
from data.loading.cpu_loader import CpuLoader
from data.loading.dali import DaliLoader, DaliUnavailableError
from data.order.class_orders import BalancedOrder, ClassIndex, IdentityOrder
from data.order.sampler import BatchPlan, EpochOrder, Order
from data.order.window_order import WindowOrder

_log = logging.getLogger(__name__)


def build_loader(
    records: ImageSource,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    backend: Backend,
    device: torch.device,
    threads: int,
    prefetch: int,
    flip: bool,
    augment: AugmentConfig | None = None,
    sampler: Sampler = "shuffle",
    images_per_identity: int = 4,
    window: int = 1 << 18,
) -> Loader:
    """A loader of this rank's batches.

    records: a `data.rec.records.RecordSet`; it stays the caller's to close. batch_size: images of this rank a step.
    backend: "auto" takes DALI where a GPU can augment, when it is installed, and the CPU loader otherwise: that decodes
    faster than DALI on a GPU's host too, as DALI's images have to be checked first (docs/experiments.md). threads:
    decoding threads. prefetch: batches in work ahead. flip: mirror half of the images. augment: what else happens to
    them; None: nothing. sampler, images_per_identity, window: see `build_order`.

    Raises DataError when an epoch does not fill a global batch, or batch_size cuts a group of an identity's images;
    DaliUnavailableError when backend is "dali" and DALI does not load. No collective.
    """
    order = build_order(records, sampler=sampler, images_per_identity=images_per_identity, window=window, seed=seed)
    plan = BatchPlan(
        records.num_samples, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, order=order
    )

    def build(kind: type[RecordLoader]) -> Loader:
        return kind(
            records,
            plan=plan,
            device=device,
            threads=threads,
            prefetch=prefetch,
            flip=flip,
            augment=augment or AugmentConfig(),
        )

    if backend == "cpu":
        return build(CpuLoader)
    if backend == "dali":
        return build(DaliLoader)
    if augment is None or augment.idle:
        _log.info("data.backend=auto: the CPU loader, which decodes faster than DALI")
        return build(CpuLoader)
    if device.type != "cuda":
        _log.info("data.backend=auto: the CPU loader, which decodes faster than DALI; no GPU is there to augment")
        return build(CpuLoader)
    try:
        loader = build(DaliLoader)
    except DaliUnavailableError as error:
        _log.info("data.backend=auto: the CPU loader, as %s", error)
        return build(CpuLoader)
    _log.info("data.backend=auto: DALI, which augments on the GPU")
    return loader


def build_order(records: ImageSource, *, sampler: Sampler, images_per_identity: int, window: int, seed: int) -> Order:
    """The order of the samples that `sampler` names; "balanced" and "identities" index the labels of the whole set.

    images_per_identity: images of a group, with "identities". window: images of a window, with "windows".
    """
    if sampler == "shuffle":
        return EpochOrder(records.num_samples, seed=seed)
    if sampler == "windows":
        return WindowOrder(records.num_samples, window=window, seed=seed)
    index = ClassIndex(records.labels)
    if sampler == "balanced":
        return BalancedOrder(index, seed=seed)
    return IdentityOrder(index, images_per_identity=images_per_identity, seed=seed)
