"""A training that moves from 1 to 2, 4, 3 ranks and back to 1 in the middle of epochs and refreshes, against one that
stays on one: the same images in the same steps, the same learning rates, the same losses.

The network is without BatchNorm, whose statistics are those of one rank's images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from backbones import Backbone
from configs.load import load_config
from configs.schema import ConfigError, TrainConfig
from tests.dist.test_train_step import Toy
from tests.integration.conftest import IDENTITIES, IMAGES
from tests.ranks import RankPool, ranks_of
from training.checkpoint import Checkpoints, Saved, Saver, place_of
from training.checkpoint.manifest import Facts
from training.step import TrainStep
from training.stopping import Signals
from training.trainer import Trainer

GLOBAL, EPOCHS = 24, 4
PER_EPOCH = IDENTITIES * IMAGES // GLOBAL
STEPS = PER_EPOCH * EPOCHS
MOVES = [(1, 5), (2, 11), (4, 14), (3, 21), (1, STEPS)]
"""Ranks, and the step at which they stop; 11 and 21 lie within refreshes."""


def _toy(_: str, *, embedding_size: int, recompute: float) -> Backbone:
    torch.manual_seed(3)
    assert (embedding_size, recompute) == (6, 0)
    return Toy()


def _trainer(group: dist.ProcessGroup, data: Path, output: Path, stop: int) -> Trainer:
    settings = {
        "model.embedding_size": 6, "head.scale": 16, "head.margin": 0.3, "head.subcentres": 2,
        "clustering.margin_low": 0.15, "clustering.margin_high": 0.45, "clustering.warmup_fraction": 0.25,
        "clustering.ramp_fraction": 0.25, "clustering.block": 16, "optim.lr": 0.02, "optim.warmup_epochs": 1,
        "train.device": "cpu", "train.precision": "fp32", "train.epochs": EPOCHS, "train.batch_size": GLOBAL,
        "train.global_batch": GLOBAL, "train.log_steps": 4, "data.threads": 1, "data.backend": "cpu",
        "data.path": data, "train.output": output, "train.stop_after_steps": stop % STEPS,
    }  # fmt: skip
    with mock.patch("training.building.build_backbone", _toy):
        config = load_config(None, [f"{name}={value}" for name, value in settings.items()])
        return Trainer(config, ranks_of(group))


def _train(group: dist.ProcessGroup, data: Path, output: Path, stop: int) -> list[tuple[int, float, float, list[int]]]:
    """Step, learning rate, loss and this rank's samples of every step."""
    trainer = _trainer(group, data, output, stop)
    step_of = TrainStep.__call__
    seen: list[tuple[int, float, float, list[int]]] = []

    def watched(self: TrainStep, batches: Any, *, step: int, lr: float) -> Any:
        values = step_of(self, batches, step=step, lr=lr)
        ids = [number for batch in batches for number in batch.sample_ids.tolist()]
        seen.append((step, lr, values.total.item(), ids))
        return values

    with mock.patch.object(TrainStep, "__call__", watched):
        trainer.run(Signals())
    return seen


def _joined(parts: list[list[tuple[int, float, float, list[int]]]]) -> list[tuple[int, float, float, list[int]]]:
    steps = []
    for rows in zip(*parts, strict=True):
        assert len({row[:3] for row in rows}) == 1, "all ranks have the same step, rate and loss"
        steps.append((*rows[0][:3], [number for row in rows for number in row[3]]))
    return steps


@pytest.mark.timeout(400)
def test_moving_between_numbers_of_ranks_changes_nothing(ranks: RankPool, packed: Path, tmp_path: Path) -> None:
    (whole,) = ranks.run(1, _train, packed, tmp_path / "whole", STEPS)
    moved: list[Any] = []
    for world_size, stop in MOVES:
        moved += _joined(ranks.run(world_size, _train, packed, tmp_path / "moved", stop))
    assert [row[0] for row in moved] == list(range(STEPS))
    for (step, lr, loss, ids), (_, its_lr, its_loss, its_ids) in zip(moved, whole, strict=True):
        assert (lr, ids) == (its_lr, its_ids), step
        assert loss == pytest.approx(its_loss, rel=1e-5), step
    one, other = (_final(tmp_path / name) for name in ("whole", "moved"))
    assert one.values["state"]["clusters"]["version"] == other.values["state"]["clusters"]["version"] >= 2
    assert other.names == one.names
    for name in ("head.weight", "backbone.linear.weight", "clusters.published.c_SD"):
        assert torch.allclose(other.read(name), one.read(name), rtol=1e-4, atol=1e-5), name


def _final(output: Path) -> Saved:
    return Saved(place_of(str(output / "checkpoints")), f"step_{STEPS:09d}")


def _saved_again(group: dist.ProcessGroup, data: Path, output: Path, again: Path) -> int:
    """Take a checkpoint up, and write at once what was taken up."""
    trainer = _trainer(group, data, output, STEPS)
    tensors, state = trainer.checkpoints._state.collect()
    saver = Saver(Checkpoints(place_of(str(again)), keep=1, keep_best=0), trainer.ranks, "ab")
    saver.save(tensors, Facts(step=trainer.step, run="r", values={"state": state}))
    written = saver.finish()
    saver.close()
    assert written is not None
    assert written.error == ""
    trainer.loader.close()
    return trainer.step


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 3), (3, 1)])
def test_taken_up_by_other_ranks_it_is_the_same_bit_for_bit(
    ranks: RankPool, packed: Path, tmp_path: Path, before: int, after: int
) -> None:
    """24 classes of 2 sub-centres over 4 and 3 ranks, and some 28 clusters, amid a refresh."""
    ranks.run(before, _train, packed, tmp_path / "run", 19)
    assert ranks.run(after, _saved_again, packed, tmp_path / "run", tmp_path / "again") == [19] * after
    first = Saved(place_of(str(tmp_path / "run" / "checkpoints")), "step_000000019")
    second = Saved(place_of(str(tmp_path / "again")), "step_000000019")
    assert second.manifest.world_size == after
    assert first.names == second.names
    assert any("clusters.refresh.run" in name for name in first.names)
    for name in first.names:
        if name not in ("random.cpu", "clusters.refresh.failure"):  # a row for each rank
            assert torch.equal(first.read(name), second.read(name)), name


def test_another_global_batch_is_refused_with_the_setting_that_keeps_it(
    ranks: RankPool, packed: Path, tmp_path: Path
) -> None:
    ranks.run(1, _train, packed, tmp_path / "run", 3)
    for said in ranks.run(2, _refused, packed, tmp_path / "run"):
        assert "its steps were of 24 images, this run's are of 48" in said
        assert "--set train.global_batch=24" in said


def _refused(group: dist.ProcessGroup, data: Path, output: Path) -> str:
    settings = ["model.backbone=small", f"data.path={data}", f"train.output={output}", "train.batch_size=24",
                "train.device=cpu", "data.backend=cpu", "data.threads=1"]  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        Trainer(load_config(None, settings), ranks_of(group))
    return str(error.value)


def test_a_global_batch_is_shared_out_in_as_few_micro_batches_as_come_out_even() -> None:
    config = TrainConfig(batch_size=64, global_batch=768)
    assert [config.share(ranks) for ranks in (1, 2, 3, 4, 6, 12, 16)] == [
        (64, 12), (64, 6), (64, 4), (64, 3), (64, 2), (64, 1), (48, 1)
    ]  # fmt: skip
    assert TrainConfig(batch_size=8, accumulation=3).share(5) == (8, 3)
    with pytest.raises(ConfigError, match=r"global_batch: expected a number that 5 ranks can share out"):
        config.share(5)
    with pytest.raises(ConfigError, match="micro-batches of 2"):
        TrainConfig(batch_size=8, global_batch=7).share(7)
