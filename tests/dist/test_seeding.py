"""Seeding, merging and splitting, mini-batches and files: the same bits on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.job.sharded_files import read_sharded, write_sharded
from clustering.job.state import JobState
from clustering.job.together import InputError, together
from clustering.lloyd.lloyd import Lloyd
from clustering.lloyd.minibatch import MiniBatch
from clustering.lloyd.seeding import class_means, placed, plus_plus, random_rows
from clustering.lloyd.seeding_parallel import parallel_plus_plus
from clustering.lloyd.split_merge import split_and_merge
from clustering.service.rows import TensorRows
from sharding import shard_of
from tests.ranks import WORLD_SIZES, RankPool

CPU = torch.device("cpu")
SEEDINGS = {"random": random_rows, "plus plus": plus_plus, "parallel": parallel_plus_plus}
SIZES = [(3, 5, 2), (123, 7, 20), (507, 33, 41)]
"""Rows, dimensions, clusters; the first leaves ranks without rows and clusters."""


def _problem(rows: int, dim: int) -> Tensor:
    """A third of the rows are copies, every tenth is zero."""
    x_ND = F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows), dtype=torch.float64))
    x_ND[2::3] = x_ND[: len(x_ND[2::3])].clone() if rows > 10 else x_ND[2::3]
    if rows > 10:
        x_ND[::10] = 0
    return x_ND.float()


def _own(group: dist.ProcessGroup, x_ND: Tensor) -> tuple[TensorRows, int]:
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), len(x_ND))
    return TensorRows(x_ND[shard.start : shard.stop]), shard.start


def _seeded(group: dist.ProcessGroup, name: str, rows: int, dim: int, clusters: int) -> Tensor:
    own, first = _own(group, _problem(rows, dim))
    return SEEDINGS[name](placed(own, first, CPU), clusters, group, seed=7)


@pytest.mark.parametrize("name", SEEDINGS)
@pytest.mark.parametrize(("rows", "dim", "clusters"), SIZES)
def test_seeding(ranks: RankPool, name: str, rows: int, dim: int, clusters: int) -> None:
    alone, *others = [torch.cat(ranks.run(world, _seeded, name, rows, dim, clusters)) for world in WORLD_SIZES]
    assert len(alone.unique(dim=0)) == clusters
    for other in others:
        assert torch.equal(alone, other)


def _too_many(group: dist.ProcessGroup, name: str) -> str:
    own, first = _own(group, _problem(123, 7)[:20].repeat(4, 1))
    try:
        SEEDINGS[name](placed(own, first, CPU), 20, group, seed=7)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SEEDINGS)
def test_too_many_clusters_are_an_error_on_all_ranks(ranks: RankPool, name: str) -> None:
    errors = {error for world in WORLD_SIZES for error in ranks.run(world, _too_many, name)}
    (error,) = errors
    distinct = len(_problem(123, 7)[:20].unique(dim=0)) - 1  # one of them is zero
    assert f"got {distinct} of these: use a smaller --k" in error


def _class_means(group: dist.ProcessGroup) -> Tensor:
    own, first = _own(group, _problem(252, 64))
    class_P = torch.arange(first, first + len(own)) % 11 - 1
    return class_means(own, class_P, 13, total=252, group=group)


def test_class_means(ranks: RankPool) -> None:
    alone, *others = [torch.cat(ranks.run(world, _class_means)) for world in WORLD_SIZES]
    for other in others:
        assert torch.equal(alone, other)


def _rebuilt(group: dist.ProcessGroup, rows: int, dim: int, clusters: int) -> tuple[Tensor, list[int]]:
    own, first = _own(group, _problem(rows, dim))
    centres_SD = random_rows(placed(own, first, CPU), clusters, group, seed=1)
    pairs = []
    for _ in range(3):
        lloyd = Lloyd(own, centres_SD=centres_SD, num_clusters=clusters, group=group, first_row=first)
        lloyd.iterate()
        centres_SD, found = split_and_merge(
            own, lloyd.index_P, lloyd.centres_SD, clusters, group, first_row=first
        )  # fmt: skip
        pairs.append(found)
    return centres_SD, pairs


@pytest.mark.parametrize(("rows", "dim", "clusters"), SIZES)
def test_merging_and_splitting(ranks: RankPool, rows: int, dim: int, clusters: int) -> None:
    found = [ranks.run(world, _rebuilt, rows, dim, clusters) for world in WORLD_SIZES]
    alone = found[0][0]
    for parts in found[1:]:
        assert torch.equal(torch.cat([centres for centres, _ in parts]), alone[0])
        assert all(pairs == alone[1] for _, pairs in parts)
    if rows > 3:
        assert sum(alone[1]) > 0


def _batches(group: dist.ProcessGroup, batch: int, stop: int) -> tuple[Tensor, Tensor, list[float]]:
    """Stopped after `stop` of 6 iterations and gone on with in another object."""
    x_ND = _problem(507, 33)
    own, first = _own(group, x_ND)
    centres_SD = random_rows(placed(own, first, CPU), 31, group, seed=1)
    saved: dict[str, Any] = {}
    cosines = []
    for steps in (stop, 6 - stop):
        run = MiniBatch(
            own,
            centres_SD=saved.get("centres_SD", centres_SD),
            num_clusters=31,
            group=group,
            total=507,
            batch=batch,
            seed=5,
            product_dtype=torch.float32,
        )
        for name, value in saved.items():
            setattr(run, name, value)
        cosines += [run.iterate().mean_cosine for _ in range(steps)]
        saved = {name: getattr(run, name) for name in ("centres_SD", "sums_SD", "counts_K", "number")}
    return run.centres_SD, run.counts_K, cosines


@pytest.mark.parametrize("batch", [1, 100, 507])
def test_mini_batches(ranks: RankPool, batch: int) -> None:
    found = [ranks.run(world, _batches, batch, 6) for world in WORLD_SIZES]
    found.append(ranks.run(2, _batches, batch, 2))
    _, counts_K, cosines = found[0][0]
    whole_KD = found[0][0][0]
    for parts in found:
        assert torch.equal(torch.cat([centres for centres, _, _ in parts]), whole_KD)
        assert all(torch.equal(counts, counts_K) and told == cosines for _, counts, told in parts)
    assert (whole_KD.norm(dim=1) - 1).abs().max() < 1e-5
    zero = int((_problem(507, 33) == 0).all(1).sum())
    assert int(counts_K.sum()) <= 6 * batch
    if batch == 507:
        assert int(counts_K.sum()) == 6 * (507 - zero), "a batch of all rows"
        assert cosines[-1] > cosines[0] + 0.02


def _file(group: dist.ProcessGroup, path: Path, rows: int) -> bool:
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), rows)
    whole_ND = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    write_sharded(path, whole_ND[shard.start : shard.stop], rows, group)
    own_SD = read_sharded(path, rows, 3, group, CPU)
    vector = path.with_name("vector.npy")
    write_sharded(vector, torch.arange(shard.start, shard.stop), rows, group, dtype=np.int32)
    same = np.array_equal(np.load(vector), np.arange(rows)) and np.load(vector).dtype == np.int32
    return bool(same) and torch.equal(own_SD, whole_ND[shard.start : shard.stop])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rows", [1, 7, 123])
def test_sharded_files(ranks: RankPool, tmp_path: Path, world_size: int, rows: int) -> None:
    assert all(ranks.run(world_size, _file, tmp_path / "x.npy", rows))
    expected = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vector.npy", "x.npy"]


def _cannot(group: dist.ProcessGroup, path: Path) -> list[str]:
    errors = []

    def fails_on_the_last() -> None:
        if dist.get_rank(group) == dist.get_world_size(group) - 1:
            raise InputError(f"expected é, got {'x' * 2000}")

    for work in (
        lambda: write_sharded(path / "file" / "x.npy", torch.zeros(1, 1), dist.get_world_size(group), group),
        lambda: read_sharded(path / "none.npy", 4, 3, group, CPU),
        lambda: read_sharded(path / "file", 4, 3, group, CPU),
        lambda: together(fails_on_the_last, group, CPU),
    ):
        try:
            work()
            errors.append("")
        except InputError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_errors_of_one_rank_are_those_of_all(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    (tmp_path / "file").write_text("not a folder, not an array")
    found = ranks.run(world_size, _cannot, tmp_path)
    assert all(errors == found[0] for errors in found)
    for error, part in zip(found[0], ("cannot write it", "cannot read it", "not an .npy", "é, got xxx"), strict=True):
        assert part in error


def _state(group: dist.ProcessGroup, folder: Path) -> tuple[Any, ...]:
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), 5)
    state = JobState(folder, {"seed": 1}, group, CPU)
    first = state.read()
    for number in (1, 2):
        sums = torch.arange(own.start, own.stop)[:, None] * number
        state.write(number, {"steps": [number]}, {"sums": (sums, 5), "centres": (sums.float(), 5)})
    found = state.read()
    assert found is not None
    sums = state.array(found, "sums", 5, 1, torch.int64)
    try:
        JobState(folder, {"seed": 2}, group, CPU).read()
    except InputError as error:
        return first, found["number"], found["steps"], sums, str(error)
    return ()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_state_of_a_job(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    folder = tmp_path / "x.npy.part"
    found = ranks.run(world_size, _state, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["centres-2.npy", "state.json", "sums-2.npy"]
    assert torch.equal(torch.cat([part[3] for part in found]), torch.arange(5)[:, None] * 2)
    for first, number, steps, _, error in found:
        assert (first, number, steps) == (None, 2, [2])
        assert "unfinished job with seed 1, this one has 2" in error
        assert "--force" in error


def _damaged(group: dist.ProcessGroup, folder: Path) -> str:
    try:
        JobState(folder, {"seed": 1}, group, CPU).read()
    except InputError as error:
        return str(error)
    return ""


def test_damaged_state(ranks: RankPool, tmp_path: Path) -> None:
    whole = {"fingerprint": {"seed": 1}, "number": 1, "values": {}, "arrays": {}}
    for content in ("", "{", "[]", '{"fingerprint": {}}', *(json.dumps({**whole, name: "3"}) for name in whole)):
        (tmp_path / "state.json").write_text(content)
        for error in ranks.run(2, _damaged, tmp_path):
            assert "state.json: damaged: start over with --force" in error
    (tmp_path / "state.json").write_text(json.dumps({**whole, "arrays": {"centres": "../x.npy"}}))
    assert "damaged" in ranks.run(1, _damaged, tmp_path)[0]
    (tmp_path / "state.json").write_text(json.dumps(whole))
    assert not ranks.run(1, _damaged, tmp_path)[0]
