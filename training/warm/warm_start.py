"""A run that has not begun, with weights that it did not learn: a checkpoint of step 0, which train_dist.py goes on
from like from any other."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backbones import Backbone
from configs.monitor import MonitorConfig
from configs.schema import ConfigError, ModelConfig, RunConfig
from data.errors import DataError
from sharding import Rows
from training.checkpoint import CheckpointError, Checkpoints
from training.checkpoint.folder import folder_of, part_of
from training.checkpoint.manifest import assembled
from training.checkpoint.part import write
from training.checkpointing import place_for
from training.distributed import open_ranks
from training.trainer import Trainer
from training.warm.class_centres import BLOCK, Centres, fill
from training.warm.class_map import ClassMap, no_classes, same_classes
from training.warm.class_means import Embedded, write_means
from training.warm.peer_weights import Weights
from training.warm.start_source import fits


class Started(NamedTuple):
    """What was written."""

    address: str
    """Of the checkpoint."""
    means: Embedded | None
    """None where no class was to begin with the mean of its images."""


def write_start(
    config: RunConfig,
    *,
    ranks: int,
    weights: Weights,
    heads: Centres | None,
    classes: ClassMap | None = None,
    images: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Started:
    """Write it for a run of `config` on so many ranks (or on others that keep `train.global_batch`).

    weights: of the backbone. heads: class centres, None for new ones. classes: which of them the classes of the records
    take; None: those of their numbers, as many. images: a class without a counterpart begins with the mean direction
    of so many of its images at most, at the mean length of the centres that were taken, or of new ones where none
    was; 0: with a new centre. progress: called with images that are embedded, and all of them.

    The new head is in memory here once, with blocks of the given centres, in one process, on the CPU; images are
    embedded on a GPU, if there is one and `train.device` allows it. Raises ConfigError, CheckpointError, DataError:
    above all when backbone, sizes or the number of classes are not the run's, or when it has begun.
    """
    train = config.train
    _refuse_other_weights(config.model, weights)
    if not train.resume:
        raise ConfigError("train.resume: expected true, or the run would not go on from what is written, got False")
    if (heads is not None or images) and config.head.subcentres != 1:
        raise ConfigError(f"head.subcentres: expected 1, a centre for each class, got {config.head.subcentres}")
    if heads is not None and heads.dim != config.model.embedding_size:
        raise ConfigError(
            f"model.embedding_size: expected {heads.dim}, as the class centres have, got {config.model.embedding_size}"
        )
    _refuse_begun(config)
    here = dataclasses.replace(
        train,
        resume=False,
        # Of these the run's own may be others (training.checkpoint.same_run).
        global_batch=train.global_batch or train.batch_size * train.accumulation * ranks,
    )
    train.share(ranks)
    local = dataclasses.replace(config.data, backend="cpu")
    model = dataclasses.replace(config.model, compile=False, graph=False)  # the run may have them all the same
    config = dataclasses.replace(config, model=model, train=here, data=local, monitor=MonitorConfig())
    with open_ranks(dataclasses.replace(here, device="cpu")) as alone:
        if alone.world_size > 1:
            raise ConfigError(f"expected one process, got {alone.world_size}: start this without torchrun")
        trainer = Trainer(config, alone)
        try:
            trainer.backbone.module.load_state_dict(weights.tensors)
            classes = _chosen(classes, heads, trainer.head.num_classes)
            weight_CD = trainer.head.weight.detach()
            length = float(weight_CD[:BLOCK].float().norm(dim=1).mean())
            if heads is not None and len(classes.old_P):
                length = fill(weight_CD, heads, classes)
            means = None
            is_wanted_C = classes.count_C == 0
            if images and is_wanted_C.any():
                means = write_means(
                    weight_CD,
                    trainer.records,
                    _embedding(trainer),
                    is_wanted_C,
                    most=images,
                    length=length,
                    batch_size=config.eval.batch_size,
                    threads=config.data.threads,
                    progress=progress,
                )
            return Started(_publish(trainer), means)
        finally:
            trainer.loader.close()
            trainer.records.close()


def _refuse_other_weights(model: ModelConfig, weights: Weights) -> None:
    """Raise ConfigError, CheckpointError unless they are those of this backbone."""
    if fits(weights.tensors, model):
        return
    if model.backbone in weights.backbones and model.embedding_size == weights.embedding_size:
        raise CheckpointError(
            f"the weights are not those of {model.backbone} with {model.embedding_size} components: other names or "
            "shapes"
        )
    raise ConfigError(
        f"model.backbone, model.embedding_size: the weights are of {' or '.join(weights.backbones)} with "
        f"{weights.embedding_size} components, got {model.backbone} with {model.embedding_size}"
    )


def _refuse_begun(config: RunConfig) -> None:
    """Before anything is written: a trainer that starts over lets no older checkpoint count."""
    place = place_for(config.train)
    try:
        there = Checkpoints(place, keep=1, keep_best=0).finished()
    except OSError as error:
        raise CheckpointError(f"{place.address}: cannot read it ({error.strerror or error})") from None
    if there:
        raise CheckpointError(
            f"{place.address}: expected no checkpoint, found {there[-1]}: choose another train.output"
        )


def _chosen(classes: ClassMap | None, heads: Centres | None, num_classes: int) -> ClassMap:
    if classes is None:
        return no_classes(num_classes, 0) if heads is None else same_classes(num_classes, heads.num_classes)
    if classes.num_classes != num_classes:
        raise DataError(f"data.path: its records have changed: {num_classes} classes, {classes.num_classes} before")
    return classes


def _embedding(trainer: Trainer) -> Backbone:
    module = copy.deepcopy(trainer.backbone.module)
    assert isinstance(module, Backbone)
    return module.to("cuda" if trainer.config.train.device != "cpu" and torch.cuda.is_available() else "cpu")


def _publish(trainer: Trainer) -> str:
    """As training saves, but of the tensors themselves: a copy of a large head may not fit beside it."""
    folder, name = trainer.checkpoints.folder, folder_of(0)
    tensors, facts = trainer.checkpoints.collect(0, trainer.counts())
    try:
        folder.claim(facts.run, over=False)
        part = f"{name}/{part_of(0, facts.run)}"
        told = write(folder.place, part, {key: _still(item) for key, item in tensors.items()})
        folder.publish(name, assembled([told], facts), facts.run)
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.place.remove(name)
        if isinstance(error, OSError):
            where = error.filename or folder.place.address
            raise CheckpointError(f"{where}: cannot write it ({error.strerror or error}): make room there") from None
        raise
    return f"{folder.place.address}/{name}"


def _still(item: Rows | Tensor) -> Rows | Tensor:
    """Of weights that do not change any more; a copy of those alone that do not lie row by row."""
    if isinstance(item, Rows):
        return Rows(item.tensor.detach().contiguous(), item.start, item.total)
    return item.detach().contiguous()
