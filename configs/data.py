"""Settings of the training set: where it lies, in which order it comes, and how it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from configs.checks import require

Sampler = Literal["shuffle", "windows", "balanced", "identities"]
Backend = Literal["auto", "dali", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the records lie and how they reach the ranks."""

    path: str = ""
    """Folder with train.rec, train.idx and property, or the address of one in an object store: s3://bucket/folder."""
    cache: str = ""
    """Folder for blocks of what is far away; empty: $CLUSTERFACE_CACHE, or clusterface in the user's cache folder."""
    cache_gb: float = 200.0
    """Room for such blocks, of all runs that share the folder."""
    backend: Backend = "auto"
    """Loader; both give the same batches. auto: the CPU loader, but DALI where a GPU can augment."""
    threads: int = 4
    """Decoding threads of each rank."""
    prefetch: int = 4
    """Batches decoded ahead on each rank."""
    sampler: Sampler = "shuffle"
    """Order of the images: a shuffle; one for object stores; every identity equally often; groups of images of one
    identity (docs/data.md)."""
    images_per_identity: int = 4
    """K, images of a group, with data.sampler=identities; train.batch_size must be a multiple of it."""
    window: int = 262_144
    """Images that are shuffled together, with data.sampler=windows."""
    flip: bool = True
    """Mirror half of the images."""
    max_bad_images: int = 100
    """Images that do not decode are skipped and counted; all ranks stop together above this many in an epoch."""

    def __post_init__(self) -> None:
        require(self.backend in get_args(Backend), "data.backend", self.backend, "auto, dali or cpu")
        require(self.threads >= 1, "data.threads", self.threads, "at least 1")
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1")
        require(
            self.sampler in get_args(Sampler), "data.sampler", self.sampler, "shuffle, windows, balanced or identities"
        )
        require(self.window >= 1024, "data.window", self.window, "at least 1024")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "more than 0")
        require(self.images_per_identity >= 2, "data.images_per_identity", self.images_per_identity, "at least 2")
        require(self.max_bad_images >= 0, "data.max_bad_images", self.max_bad_images, "0 or more")
