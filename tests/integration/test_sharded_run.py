"""A whole run with `model.shard`: evaluated, stopped, gone on from and ended as one that shards nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from configs.load import load_config
from tests.ranks import RankPool, ranks_of
from training.checkpoint import Saved, place_of
from training.checkpoint.tools import export_backbone
from training.stopping import Signals
from training.trainer import Trainer

STEPS, STOP = 8, 5
Command = Callable[..., list[str]]


def _train(group: dist.ProcessGroup, settings: list[str]) -> tuple[str, float | None]:
    trainer = Trainer(load_config(None, settings), ranks_of(group))
    return trainer.run(Signals()), trainer.work.flops_per_image


def _saved(output: Path) -> Saved:
    return Saved(place_of(str(output / "checkpoints")), f"step_{STEPS:09d}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_ends_as_one_that_shards_nothing(ranks: RankPool, command: Command, tmp_path: Path) -> None:
    def run(world_size: int, *more: str, name: str) -> Path:
        common: tuple[str, ...] = (
            "train.epochs=1",
            "eval.sets=[verification.bin]",
            "optim.name=adamw",
            "optim.lr=0.002",
        )
        common += ("train.global_batch=24", "train.batch_size=24", "model.recompute=1")
        whole = command(2, *common, *more, name=name)
        told = ranks.run(world_size, _train, whole[whole.index("train_dist.py") + 2 :: 2])
        assert [end for end, _ in told] == [""] * world_size
        assert all(flops for _, flops in told)
        return tmp_path / name

    plain, cut = run(2, name="plain"), run(2, "model.shard=all", name="cut")
    run(2, "model.shard=all", f"train.stop_after_steps={STOP}", name="parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    parts, moved = run(2, "model.shard=all", name="parts"), run(2, name="moved")

    whole = _saved(cut)
    for name in whole.names:
        assert torch.equal(_saved(parts).read(name), whole.read(name)), name
    for output in (cut, moved):
        for name in _saved(plain).names:
            if name.startswith("backbone.") or name == "head.weight":
                near = torch.allclose(
                    _saved(output).read(name).float(), _saved(plain).read(name).float(), rtol=0.02, atol=5e-3
                )
                assert near, name
    for first, second in zip(_lines(plain / "verification.jsonl"), _lines(cut / "verification.jsonl"), strict=True):
        assert first["accuracy"] == pytest.approx(second["accuracy"], abs=0.051)  # two pairs of 40
    assert _lines(parts / "verification.jsonl") == _lines(cut / "verification.jsonl")

    weights = torch.load(cut / "backbone.pt", weights_only=True)
    build_backbone("small", embedding_size=16).load_state_dict(weights)
    export_backbone(whole, tmp_path / "exported.pt")
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
