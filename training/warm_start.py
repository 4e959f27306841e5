"""A run that has not begun, with weights that it did not learn: a checkpoint of step 0, which train_dist.py goes on
from like from any other."""

from __future__ import annotations

import dataclasses

import torch

from configs.schema import ConfigError, RunConfig
from training.checkpoint import CheckpointError
from training.checkpoint.folder import folder_of
from training.distributed import open_ranks
from training.metrics import RunLog
from training.peer_weights import Heads, Weights
from training.trainer import Trainer


def write_start(config: RunConfig, *, ranks: int, weights: Weights, heads: Heads | None) -> str:
    """Write it for a run of `config` on so many ranks (or on others that keep `train.global_batch`); its address.

    weights: of the backbone. heads: class centres, None for new ones. All of them are in memory here, in one process,
    on the CPU. Raises ConfigError, CheckpointError, DataError: above all when backbone, sizes or the number of classes
    are not the run's, or when it has begun.
    """
    train = config.train
    if config.model.backbone not in weights.backbones or config.model.embedding_size != weights.embedding_size:
        raise ConfigError(
            f"model.backbone, model.embedding_size: the weights are of {' or '.join(weights.backbones)} with "
            f"{weights.embedding_size} components, got {config.model.backbone} with {config.model.embedding_size}"
        )
    if not train.resume:
        raise ConfigError("train.resume: expected true, or the run would not go on from what is written, got False")
    if heads is not None and config.head.subcentres != 1:
        raise ConfigError(f"head.subcentres: expected 1, as in the files, got {config.head.subcentres}")
    images = train.global_batch or train.batch_size * train.accumulation * ranks
    config.train.share(ranks)
    # Of these the run's own may be others (training.checkpoint.same_run).
    here = dataclasses.replace(train, resume=False, global_batch=images)
    config = dataclasses.replace(config, train=here, data=dataclasses.replace(config.data, backend="cpu"))
    with open_ranks(dataclasses.replace(here, device="cpu")) as alone:
        if alone.world_size > 1:
            raise ConfigError(f"expected one process, got {alone.world_size}: start this without torchrun")
        trainer = Trainer(config, alone)
        try:
            if there := trainer.checkpoints.folder.folders():
                raise CheckpointError(
                    f"{trainer.checkpoints.folder.place.address}: expected no checkpoint, found {there[-1]}: choose "
                    "another train.output"
                )
            trainer.backbone.module.load_state_dict(weights.tensors)
            if heads is not None:
                _fill(trainer, heads)
            log = RunLog(trainer.output, active=False, total_steps=trainer.total_steps, first_step=0)
            trainer.checkpoints.save(0, trainer._values, log, last=True)
        finally:
            trainer.loader.close()
            trainer.records.close()
        return f"{trainer.checkpoints.folder.place.address}/{folder_of(0)}"


def _fill(trainer: Trainer, heads: Heads) -> None:
    classes, dim = trainer.head.num_classes, trainer.config.model.embedding_size
    if (heads.num_classes, heads.dim) != (classes, dim):
        raise ConfigError(
            f"data.path: its records have {classes} classes, the centres are {heads.num_classes} of {heads.dim} "
            "components: leave --heads away to begin with new ones"
        )
    with torch.no_grad():
        for first, centres in heads.rows():
            trainer.head.weight[first : first + len(centres)].copy_(centres)
