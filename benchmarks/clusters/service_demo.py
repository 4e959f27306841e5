"""Two trainings of the demo in one process, with clusters and without, step by step in turns on the same batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from configs.load import load_config
from training.demo import SMALL
from training.distributed import Ranks
from training.trainer import Trainer

UNTIMED = 2
"""Epochs before: in the first one the bank fills, in the second one the first version is made."""
_CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


@dataclass(frozen=True, slots=True)
class DemoTimes:
    """Seconds of every timed step."""

    plain: list[float]
    clusters: list[float]
    words: str
    """What the steps consist of."""


def _trainer(data: Path, folder: Path, epochs: int, ranks: Ranks, *, clusters: bool, small: bool) -> Trainer:
    """Cluster terms count from the first publication on, so that every timed step has all of them after it."""
    few = [text for text in SMALL.settings if "epochs" not in text] if small else []
    return Trainer(
        load_config(
            _CONFIG,
            [
                *few,
                *(f"data.path={data}", f"train.output={folder / str(clusters)}", "eval.sets=[]"),
                *(f"train.epochs={epochs}", "optim.warmup_epochs=1", "train.device=cpu"),
                *("clustering.warmup_fraction=0", "clustering.ramp_fraction=0"),
                f"clustering.enabled={str(clusters).lower()}",
            ],
        ),
        ranks,
    )


def demo_times(data: Path, folder: Path, epochs: int, ranks: Ranks, *, small: bool) -> DemoTimes:
    """Steps from the third epoch on: each epoch has a whole refresh then, and all losses. One rank."""
    arms = {name: _trainer(data, folder, epochs, ranks, clusters=name, small=small) for name in (False, True)}
    guided = arms[True]
    service, steps = guided.service, guided.steps_per_epoch
    assert service is not None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    before = 0
    for epoch in range(epochs):
        stream = guided.loader.epoch(epoch)
        for position in range(steps):
            batch, step = next(stream), epoch * steps + position
            for name in (False, True) if step % 2 else (True, False):  # nobody always comes first
                trainer = arms[name]
                began = time.thread_time()
                trainer.train_step([batch], step=step, lr=0.001)
                ended = time.thread_time()
                if epoch >= UNTIMED:
                    seconds[name].append(ended - began)
        stream.close()
        if epoch == UNTIMED - 1:
            before = service.version
            for trainer in arms.values():
                trainer.train_step.head_time.take()
                trainer.train_step.cluster_time.take()
    head, cluster = guided.train_step.head_time.take(), guided.train_step.cluster_time.take()
    timed = len(seconds[True])
    plain_head = arms[False].train_step.head_time.take() / timed
    for trainer in arms.values():
        trainer.loader.close()
    return DemoTimes(
        plain=seconds[False],
        clusters=seconds[True],
        words=(
            f"B = {guided.global_batch}, {guided.records.num_classes} classes, {service.num_clusters} clusters, "
            f"{guided.records.num_samples} samples; {service.version - before} refreshes in {timed} timed steps; "
            f"by the clock head and losses {1000 * head / timed:.1f} ms a step (plain {1000 * plain_head:.1f}), bank, "
            f"centres and slices {1000 * cluster / timed:.1f}"
        ),
    )
