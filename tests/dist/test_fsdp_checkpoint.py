"""Checkpoints of a sharded backbone: gone on from to the same bits, by other ranks, and by runs that shard nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.fsdp_cases import Run
from tests.ranks import RankPool
from training.checkpoint import CheckpointError, Checkpoints, Saved, Saver, place_of
from training.checkpoint.manifest import Facts
from training.checkpoint.tools import reshard
from training.run_state import is_cut

FIRST, LAST = 2, 4
FOLDER = f"step_{FIRST:09d}"
WHOLE: dict[str, Any] = {}
ALL: dict[str, Any] = {"shard": "all"}
HOSTS: dict[str, Any] = {"shard": "host", "host_ranks": 2}


class Ended(NamedTuple):
    """A training of which the steps from FIRST on are told."""

    told: list[list[float]]
    then: dict[str, Tensor]
    """Weights at FIRST."""
    weights: dict[str, Tensor]


def _end(run: Run) -> Ended:
    then = run.weights()
    return Ended(run.steps(FIRST, LAST), then, run.weights())


def _save(group: dist.ProcessGroup, settings: dict[str, Any], folder: Path) -> Ended:
    run = Run(group, **settings)
    run.steps(0, FIRST)
    tensors, state = run.state.collect()
    saver = Saver(Checkpoints(place_of(str(folder)), keep=1, keep_best=0), run.ranks, "ab")
    saver.save(tensors, Facts(step=FIRST, run="r", values={"state": state}))
    ended = _end(run)  # while it is written
    written = saver.finish()
    saver.close()
    assert written is not None
    assert written.error == ""
    return ended


def _saved(folder: Path) -> Saved:
    return Saved(place_of(str(folder)), FOLDER)


def _go_on(group: dist.ProcessGroup, settings: dict[str, Any], folder: Path) -> Ended:
    run = Run(group, **settings)
    run.steps(5, 6)  # what is restored replaces moments, statistics and random states
    run.state.restore(_saved(folder))
    return _end(run)


@pytest.mark.parametrize(
    ("world_size", "settings", "net"),
    [(2, ALL, {"net": "vit", "recompute": 1.0}), (4, HOSTS, {"net": "small", "optimizer": "adamw"})],
)
def test_a_resumed_run_ends_with_the_bits_of_one_left_alone(
    ranks: RankPool, tmp_path: Path, world_size: int, settings: dict[str, Any], net: dict[str, Any]
) -> None:
    """With BatchNorm, AdamW's counts, and masks that are drawn."""
    alone = ranks.run(world_size, _save, {**settings, **net}, tmp_path)
    resumed = ranks.run(world_size, _go_on, {**settings, **net}, tmp_path)
    for rank, (one, other) in enumerate(zip(alone, resumed, strict=True)):
        assert one.told == other.told
        for name, tensor in one.weights.items():
            if rank == 0 or "running" not in name:  # of BatchNorm's statistics rank 0's count
                assert torch.equal(other.weights[name], tensor), name


MOVES = [
    (2, ALL, 2, WHOLE, "sgd"),
    (4, ALL, 1, WHOLE, "adamw"),
    (1, WHOLE, 4, HOSTS, "sgd"),
    (4, HOSTS, 2, ALL, "adamw"),
]


@pytest.mark.parametrize(("before", "was", "after", "now", "optimizer"), MOVES)
def test_other_ranks_and_other_cuts_go_on_from_it(
    ranks: RankPool, tmp_path: Path, before: int, was: dict[str, Any], after: int, now: dict[str, Any], optimizer: str
) -> None:
    """The same bits when they begin, the same losses to rounding as the run that wrote it."""
    alone = ranks.run(before, _save, {**was, "optimizer": optimizer}, tmp_path)
    resumed = ranks.run(after, _go_on, {**now, "optimizer": optimizer}, tmp_path)
    for part in resumed:
        for name, tensor in alone[0].then.items():
            assert torch.equal(part.then[name], tensor), name
        assert np.allclose(part.told, alone[0].told, rtol=1e-4, atol=1e-5)
        for name, tensor in alone[0].weights.items():
            assert torch.allclose(part.weights[name], tensor, rtol=1e-4, atol=1e-5), name


def test_the_format_is_that_of_a_whole_one_and_each_rank_writes_its_rows(ranks: RankPool, tmp_path: Path) -> None:
    found = []
    for world_size, name, settings in ((2, "whole", WHOLE), (2, "all", ALL), (4, "host", HOSTS)):
        ended = ranks.run(world_size, _save, {"net": "small", **settings}, tmp_path / name)[0]
        saved = _saved(tmp_path / name)
        for weight, tensor in ended.then.items():
            assert torch.equal(saved.read(f"backbone.{weight}"), tensor), weight
        found.append(saved)
    whole, cut, hosts = found
    assert whole.names == cut.names == hosts.names
    for name in whole.names:
        if not name.startswith("random."):
            assert whole.shape(name) == cut.shape(name) == hosts.shape(name)
    sizes = [part.size for part in cut.manifest.parts.values()]
    assert max(sizes) < 0.6 * sum(sizes)
    of_hosts = sorted(part.size for part in hosts.manifest.parts.values())
    assert of_hosts[1] < 0.01 * of_hosts[2], "of two copies one is written"
    again = reshard(cut, str(tmp_path / "again"), 3, is_cut)
    assert all(torch.equal(again.read(name), cut.read(name)) for name in cut.names)


def _refused(group: dist.ProcessGroup, folder: Path, net: str) -> str:
    with pytest.raises(CheckpointError) as error:
        Run(group, net=net, **ALL).state.restore(_saved(folder))
    return str(error.value)


def test_another_network_s_weights_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _save, {"net": "blocks"}, tmp_path)
    for said in ranks.run(2, _refused, tmp_path, "small"):
        assert "was written by another version of this program (names of the backbone's weights differ)" in said
