"""Choice and construction of a loader."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from configs.augment import AugmentConfig
from data.base_loader import RecordLoader
from data.batch import ImageSource, Loader
from data.cpu_loader import CpuLoader
from data.dali import DaliLoader, DaliUnavailableError
from data.sampler import BatchPlan

_log = logging.getLogger(__name__)


def build_loader(
    records: ImageSource,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    backend: Literal["auto", "dali", "cpu"],
    device: torch.device,
    threads: int,
    prefetch: int,
    flip: bool,
    augment: AugmentConfig | None = None,
) -> Loader:
    """A loader of this rank's batches.

    records: a `data.records.RecordSet`; it stays the caller's to close. batch_size: images of this rank a step.
    backend: "auto" takes DALI for a GPU, when it is installed, and the CPU loader otherwise: without a GPU the CPU
    loader is faster, as DALI's images have to be checked first. threads: decoding threads. prefetch: batches in work
    ahead. flip: mirror half of the images. augment: what else happens to them; None: nothing.

    Raises DataError when the set does not fill a global batch, DaliUnavailableError when backend is "dali" and DALI
    does not load. No collective.
    """
    plan = BatchPlan(records.num_samples, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)

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
    if device.type != "cuda":
        _log.info("data.backend=auto: the CPU loader, which decodes faster than DALI without a GPU")
        return build(CpuLoader)
    try:
        loader = build(DaliLoader)
    except DaliUnavailableError as error:
        _log.info("data.backend=auto: the CPU loader, as %s", error)
        return build(CpuLoader)
    _log.info("data.backend=auto: DALI, which decodes on the GPU")
    return loader
