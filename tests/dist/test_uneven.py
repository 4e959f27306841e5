"""Ranks that disagree about the data, and more ranks than classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from configs.data import DataConfig
from configs.head import HeadConfig
from configs.schema import ConfigError, EvalConfig, ModelConfig, RunConfig, TrainConfig
from data.__main__ import main as data
from tests.ranks import RankPool, ranks_of
from training.ranks.agreement import label_digest, refuse_different_sets
from training.stopping import Signals
from training.trainer import Trainer


def _check(group: dist.ProcessGroup, sets: dict[int, list[int]], usual: list[int]) -> str:
    labels = np.array(sets.get(dist.get_rank(group), usual), dtype=np.int64)
    records = SimpleNamespace(labels=labels, num_samples=len(labels), num_classes=int(labels.max()) + 1)
    try:
        refuse_different_sets(records, label_digest(records), ranks_of(group))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_set_everywhere(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _check, {}, [0, 0, 1, 2]) == [""] * world_size


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([0, 0, 1], "rank 0 has 4 images of 3 identities, rank 2 has 3 images of 2 identities:"),
        ([0, 1, 1, 2], "rank 0 has 4 images of 3 identities, rank 2 has 4 images of 3 identities with other labels:"),
    ],
)
def test_another_set_on_one_rank_is_refused_on_all(ranks: RankPool, theirs: list[int], said: str) -> None:
    answers = ranks.run(4, _check, {2: theirs}, [0, 0, 1, 2])
    assert len(set(answers)) == 1
    assert said in answers[0]


def _train(group: dist.ProcessGroup, config: RunConfig) -> str:
    return Trainer(config, ranks_of(group)).run(Signals())


def test_a_rank_without_classes_trains_along(ranks: RankPool, tmp_path: Path) -> None:
    """3 identities on 4 ranks, with clusters, evaluation, a checkpoint in the middle, and on from there."""
    arguments = ["--identities", "3", "--images-per-identity", "16", "--verification-identities", "4", "--pairs", "20"]
    folder = tmp_path / "set"
    assert data(["pack", "synthetic", "--out", str(folder), "--workers", "1", "--seed", "3", *arguments]) == 0
    train = TrainConfig(
        output=str(tmp_path / "run"), device="cpu", precision="fp32", epochs=4, batch_size=4, cpu_threads=1,
        checkpoint_steps=3, stop_after_steps=7,
    )  # fmt: skip
    config = RunConfig(
        data=DataConfig(path=str(folder), backend="cpu", threads=1),
        model=ModelConfig(backbone="small", embedding_size=16),
        head=HeadConfig(scale=16.0),
        train=train,
        eval=EvalConfig(sets=("verification.bin",)),
    )
    assert ranks.run(4, _train, config, timeout=100) == [""] * 4
    whole = dataclasses.replace(config, train=dataclasses.replace(train, stop_after_steps=0))
    assert ranks.run(4, _train, whole, timeout=100) == [""] * 4
    assert (tmp_path / "run" / "backbone.pt").is_file()
