"""Typed configuration: every setting of a run, its default, its meaning and its check.

One frozen dataclass a section; `RunConfig` holds them all. YAML files and `--set section.field=value` are read
by `configs.load`. A check that needs more than its own section lives in `RunConfig.__post_init__`; a check that
needs the data or the hardware lives where those are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.augment import AugmentConfig
from configs.checks import ConfigError, require
from configs.clustering import ClusteringConfig
from configs.data import DataConfig
from configs.guard import GuardConfig
from configs.head import HeadConfig
from configs.monitor import MonitorConfig
from configs.showing import ProfileConfig, TensorBoardConfig

__all__ = [
    "AugmentConfig",
    "ClusteringConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "HeadConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "ProfileConfig",
    "RunConfig",
    "TensorBoardConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network that turns a face into an embedding."""

    backbone: str = "iresnet50"
    """A name of `backbones.names()`, or timm/ and a name of timm's, such as timm/convnext_tiny (docs/backbones.md)."""
    embedding_size: int = 512
    """D, components of an embedding."""
    recompute: float = 0.0
    """Activation checkpointing: share of the backbone's blocks, from the first on, that keep only their input in
    training; backward computes the rest of them again. Less memory, more time, the same gradients."""
    compile: bool = False
    """Train the backbone through torch.compile. It takes a minute or so to begin with, needs a C++ compiler, and gave
    the training step nothing on an H100 (docs/backbones.md)."""
    graph: bool = False
    """Record the backbone's passes of a micro-batch, forward and backward, as CUDA graphs, and replay them: for a GPU
    that waits for a host that is slow at launching kernels. It takes more memory (docs/backbones.md)."""
    shard: Literal["none", "host", "all"] = "none"
    """Cut the backbone's weights, gradients and moments over ranks, by FSDP2: over all, or over those of a host, with a
    copy on each host. Less memory, more bytes on the wire, the same training (docs/several_machines.md)."""

    def __post_init__(self) -> None:
        require(bool(self.backbone), "model.backbone", self.backbone, "a name of backbones.names()")
        require(self.embedding_size >= 2, "model.embedding_size", self.embedding_size, "at least 2")
        require(0 <= self.recompute <= 1, "model.recompute", self.recompute, "0 to 1, a share of the blocks")
        require(self.shard in ("none", "host", "all"), "model.shard", self.shard, "none, host or all")
        require(
            not (self.compile and self.shard != "none"),
            "model.compile",
            self.compile,
            "false with model.shard, whose gathers torch.compile would have to break its programs at",
        )
        for name, off in (("compile", False), ("shard", "none"), ("recompute", 0)):
            value = getattr(self, name)
            require(not self.graph or value == off, "model." + name, value, f"{str(off).lower()} with model.graph")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Of the backbone and of the class centres."""
    lr: float = 0.1
    """Peak learning rate for `reference_batch` images a step; scaled linearly to the batch in use."""
    reference_batch: int = 512
    """Global batch for which lr is meant; 0 takes lr as it is."""
    momentum: float = 0.9
    """SGD's momentum, or AdamW's beta1."""
    weight_decay: float = 5e-4
    """Of all weights and of the class centres; with sgd part of the gradient, with adamw apart from it."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """Decay after the warm-up: polynomial of power 2, or half a cosine; both end at 0."""
    warmup_epochs: float = 0.0
    """Epochs of linear growth from 0 to the peak."""
    clip_norm: float = 5.0
    """Largest norm of the backbone's gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        require(self.name in ("sgd", "adamw"), "optim.name", self.name, "sgd or adamw")
        require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        require(self.reference_batch >= 0, "optim.reference_batch", self.reference_batch, "0 or more")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 <= momentum < 1")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.schedule in ("polynomial", "cosine"), "optim.schedule", self.schedule, "polynomial or cosine")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, precision, and what is written when."""

    output: str = "runs/default"
    """Folder for checkpoints, TensorBoard logs and results."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is a GPU for each rank, else the CPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16: the backbone runs under autocast, and on GPUs the products of head and clusters take bf16 operands. fp16,
    for GPUs older than Ampere: the backbone alone, with a loss scale."""
    epochs: int = 20
    """Times through the training set."""
    batch_size: int = 128
    """Images a rank takes in one micro-batch."""
    accumulation: int = 1
    """Micro-batches a rank adds up before one optimizer step."""
    global_batch: int = 0
    """Images of an optimizer step over all ranks, whatever their number: they share them out in as few micro-batches of
    at most batch_size as come out even (accumulation is then not read). 0: batch_size x accumulation x ranks."""
    seed: int = 2048
    """Of first weights, the order of samples, flips, augmentations and sampled classes."""
    cpu_threads: int = 0
    """Threads of a rank for arithmetic on the CPU; 0 shares the cores among the host's ranks."""
    timeout: int = 600
    """Seconds that ranks wait for one that is late or gone (600 at least until the first step is done)."""
    log_steps: int = 50
    """Optimizer steps between two lines of the log."""
    histogram_steps: int = 500
    """Optimizer steps between two sets of margin and hard-level histograms."""
    checkpoint_steps: int = 0
    """Optimizer steps between two checkpoints; 0 writes one an epoch."""
    checkpoints: str = ""
    """Folder, or address of an object store, for checkpoints; empty: `checkpoints` in output."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the best verification accuracy that are kept beside them."""
    resume: bool = True
    """Continue from the newest checkpoint, if there is one."""
    stop_after_steps: int = 0
    """End cleanly after this many optimizer steps, with a checkpoint; 0 trains to the end."""

    def __post_init__(self) -> None:
        require(bool(self.output), "train.output", self.output, "a folder")
        require(self.device in ("auto", "cuda", "cpu"), "train.device", self.device, "auto, cuda or cpu")
        require(self.precision in ("fp32", "bf16", "fp16"), "train.precision", self.precision, "fp32, bf16 or fp16")
        for name in (
            "epochs",
            "accumulation",
            "log_steps",
            "histogram_steps",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            require(value >= 1, "train." + name, value, "at least 1")
        require(
            self.batch_size >= 2,
            "train.batch_size",
            self.batch_size,
            "at least 2 (BatchNorm has no statistics of a single image)",
        )
        require(self.timeout >= 5, "train.timeout", self.timeout, "at least 5 seconds")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "0 to 2^63 - 1")
        for name in ("cpu_threads", "checkpoint_steps", "stop_after_steps", "global_batch", "keep_best"):
            value = getattr(self, name)
            require(value >= 0, "train." + name, value, "0 or more")

    def share(self, ranks: int) -> tuple[int, int]:
        """Images of a micro-batch, and micro-batches of a step, for each of so many ranks.

        Raises ConfigError when `global_batch` cannot be shared out evenly.
        """
        if not self.global_batch:
            return self.batch_size, self.accumulation
        each, left = divmod(self.global_batch, ranks)
        sizes = [size for size in range(2, min(each, self.batch_size) + 1) if each % size == 0]
        if left or not sizes:
            raise ConfigError(
                f"train.global_batch: expected a number that {ranks} ranks can share out in micro-batches of 2 to "
                f"train.batch_size = {self.batch_size} images, got {self.global_batch}: use another, or another number "
                "of ranks"
            )
        return sizes[-1], each // sizes[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Verification while training."""

    sets: tuple[str, ...] = ()
    """Verification sets (.bin), absolute or relative to data.path."""
    every_epochs: float = 1.0
    """Epochs between two evaluations; one more is made at the end."""
    batch_size: int = 64
    """Images that a rank embeds at a time."""

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "eval.every_epochs", self.every_epochs, "more than 0")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def share(self, ranks: int) -> tuple[int, int]:
        """`TrainConfig.share`. Raises ConfigError also for several micro-batches a step with `model.graph`."""
        size, accumulation = self.train.share(ranks)
        if self.model.graph and accumulation > 1:  # the next replay overwrites gradients that DDP has not copied
            total = self.train.global_batch
            name, remedy = ("global_batch", "use more ranks") if total else ("accumulation", "set it to 1")
            raise ConfigError(
                f"train.{name}: expected one micro-batch a step with model.graph, got {accumulation} of {size} images: "
                f"{remedy}, or a larger train.batch_size, or set model.graph to false"
            )
        return size, accumulation

    def __post_init__(self) -> None:
        if not self.train.global_batch:  # else it takes the number of ranks to know
            self.share(1)
        catch_up = self.head.missed_steps == "catch_up"
        require(not catch_up or self.optim.name == "sgd", "optim.name", self.optim.name, "sgd with catch_up")
        c = self.clustering
        if c.enabled:
            require(
                c.margin_rule == "kappaface" or c.margin_low <= self.head.margin <= c.margin_high,
                "head.margin",
                self.head.margin,
                f"within clustering.margin_low … margin_high ({c.margin_low} … {c.margin_high})",
            )
            name, value = "clustering.hard_negatives", c.hard_negatives
            require(value == 0 or self.head.sample_rate < 1, name, value, "0, as head.sample_rate=1 draws every class")
