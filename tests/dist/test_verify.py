"""Verification while training: one network's figures on every number of ranks, and a diverged one stops all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from configs.schema import DataConfig, EvalConfig, RunConfig, TrainConfig
from data.verification_bin import write_bin
from tests.image_cases import jpeg
from tests.ranks import RankPool, ranks_of
from training.errors import TrainingError
from training.showing.metrics import RunLog
from training.stopping import Signals, StopRequest
from training.verify import Verification, share_statistics


class _Records(NamedTuple):
    """What is asked of a training set: files beside it."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name


def _evaluate(group: dist.ProcessGroup, folder: Path, poison: bool) -> str:
    """Ranks with different BatchNorm statistics, as between two training steps; rank 0's are the ones that count."""
    ranks = ranks_of(group)
    config = RunConfig(
        data=DataConfig(path=str(folder)),
        train=TrainConfig(precision="fp32"),
        eval=EvalConfig(sets=("pairs.bin",), batch_size=8),
    )
    torch.manual_seed(3)
    backbone = build_backbone("small", embedding_size=16)
    for buffer in backbone.buffers():
        if buffer.is_floating_point():
            buffer.add_(ranks.rank)
    if poison:
        backbone.linear.weight.data.fill_(float("nan"))
    output = folder / f"world{ranks.world_size}"
    output.mkdir(exist_ok=True)
    log = RunLog(output, active=ranks.is_main, total_steps=10, first_step=0)
    try:
        verification = Verification(config, _Records(folder), ranks)  # type: ignore[arg-type]
        verification.run(backbone, 0, log, output, StopRequest(verification._ranks, Signals()))
        verification.run(backbone, 5, log, output, StopRequest(verification._ranks, Signals()))
        verification.close()
    except TrainingError as error:
        return str(error)
    finally:
        log.close()
    return "done"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    images = [jpeg(seed // 2 if seed % 4 < 2 else seed) for seed in range(50)]
    write_bin(folder / "pairs.bin", images, np.arange(25) % 2 == 0)
    return folder


def test_figures_do_not_depend_on_the_ranks(ranks: RankPool, pairs: Path) -> None:
    found = {}
    for world_size in (1, 2, 4):
        assert ranks.run(world_size, _evaluate, pairs, False) == ["done"] * world_size
        lines = (pairs / f"world{world_size}" / "verification.jsonl").read_text().splitlines()
        found[world_size] = [json.loads(line) for line in lines]
        assert (pairs / f"world{world_size}" / "roc_pairs.png").stat().st_size > 10_000
    assert [line["step"] for line in found[1]] == [0, 5]
    assert found[1][0]["accuracy"] == found[1][1]["accuracy"]
    for world_size in (2, 4):
        for line, expected in zip(found[world_size], found[1], strict=True):
            assert line == pytest.approx(expected, abs=1e-6)


def test_embeddings_that_are_not_finite_stop_all_ranks(ranks: RankPool, pairs: Path) -> None:
    for message in ranks.run(2, _evaluate, pairs, True):
        assert "embeddings of pairs are not finite after step 0: the training has diverged" in message


def _shared(group: dist.ProcessGroup) -> list[float]:
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean += dist.get_rank(group) + 1.0
    norm.running_var *= dist.get_rank(group) + 2.0
    share_statistics(torch.nn.Sequential(norm, torch.nn.Linear(3, 2)), group)
    return [*norm.running_mean.tolist(), *norm.running_var.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_statistics_are_those_of_rank_0(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _shared) == [[1.0] * 3 + [2.0] * 3] * world_size
