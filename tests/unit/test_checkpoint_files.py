"""A checkpoint's files: read back by safetensors and by torch.distributed.checkpoint, and refused when damaged."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor

from sharding import Rows, all_shards
from training.checkpoint import CheckpointError, DamagedError, Saved, place_of
from training.checkpoint.folder import Checkpoints, part_of
from training.checkpoint.manifest import BLOCK, NAME, Facts, assembled, parse
from training.checkpoint.part import write
from training.checkpoint.places import Folder

WHOLE = {
    "centres": torch.randn(11, 5),
    "half": torch.randn(11, 3).bfloat16(),
    "seen": torch.rand(11) > 0.5,
    "counts": torch.arange(11),
    "codes": torch.arange(11, dtype=torch.int32),
}
EVERYWHERE = {
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "image": torch.randn(2, 3, 4, 4),
    "none": torch.empty(0),
}
VALUES = {"text": "é", "number": 1.5, "nothing": None, "list": [1, 2]}


def save(
    folder: Path, world_size: int, step: int = 7, token: str = "a1", saved: float = 1.0, keep: int = 2, run: str = "r"
) -> Saved:
    """What ranks of a run write, by one process."""
    checkpoints = Checkpoints(place_of(str(folder)), keep=keep, keep_best=1)
    name = f"step_{step:09d}"
    told = []
    for rank, shard in enumerate(all_shards(world_size, 11)):
        rows: Mapping[str, Rows | Tensor] = {
            key: Rows(tensor[shard.start : shard.stop].contiguous(), shard.start, 11) for key, tensor in WHOLE.items()
        }
        if rank == 0:
            rows = {**rows, **EVERYWHERE}
        told.append(write(checkpoints.place, f"{name}/{part_of(rank, token)}", rows))
    manifest = replace(assembled(told, Facts(step=step, run=run, values=VALUES)), saved=saved)
    checkpoints.publish(name, manifest, checkpoints.pointer("owner"))
    checkpoints.tidy(name)
    return Saved(checkpoints.place, name)


@pytest.mark.parametrize("world_size", [1, 3, 4, 16])
def test_any_rows_come_back_whatever_ranks_wrote_them(tmp_path: Path, world_size: int) -> None:
    saved = save(tmp_path, world_size)
    assert saved.values == VALUES
    for name, tensor in {**WHOLE, **EVERYWHERE}.items():
        assert saved.shape(name) == tuple(tensor.shape)
        assert torch.equal(saved.read(name), tensor)
        assert saved.read(name).dtype == tensor.dtype
    for name, tensor in WHOLE.items():
        for start in range(12):
            for stop in range(start, 12):
                assert torch.equal(saved.read(name, start, stop), tensor[start:stop])
    with pytest.raises(DamagedError, match="expected rows 0 to 12, found 11"):
        saved.read("codes", 0, 12)


@pytest.mark.parametrize("world_size", [1, 3])
def test_torch_distributed_checkpoint_reads_them(tmp_path: Path, world_size: int) -> None:
    save(tmp_path, world_size)
    there: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    there["image"] = torch.zeros_like(EVERYWHERE["image"])
    dcp.load(there, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step_000000007")), no_dist=True)
    for name, tensor in there.items():
        assert torch.equal(tensor, {**WHOLE, **EVERYWHERE}[name]), name


def test_safetensors_reads_a_part(tmp_path: Path) -> None:
    save(tmp_path, 2)
    second = next((tmp_path / "step_000000007").glob("rank_00001-*.safetensors"))
    with safe_open(second, framework="pt") as file:
        assert set(file.keys()) == set(WHOLE)
        for name, tensor in WHOLE.items():
            assert torch.equal(file.get_tensor(name), tensor[6:])


def test_tensors_larger_than_a_block(tmp_path: Path) -> None:
    checkpoints = Checkpoints(place_of(str(tmp_path)), keep=1, keep_best=0)
    x = torch.arange(3 * BLOCK // 8 + 1001, dtype=torch.int64)[:, None]
    cut = len(x) // 3
    told = [
        write(checkpoints.place, f"step_000000001/{part_of(rank, 'b')}", {"x": Rows(rows.contiguous(), start, len(x))})
        for rank, (start, rows) in enumerate([(0, x[:cut]), (cut, x[cut:])])
    ]
    checkpoints.publish("step_000000001", assembled(told, Facts(step=1, run="r", values={})), "")
    saved = Saved(checkpoints.place, "step_000000001")
    assert torch.equal(saved.read("x"), x)
    assert torch.equal(saved.read("x", cut - 5, len(x) - 3), x[cut - 5 : len(x) - 3])


# ---- damage ----------------------------------------------------------------------------------------------------


def _reads_right(folder: Path) -> bool:
    """Whether everything is as it was; DamagedError when that is said."""
    saved = Saved(place_of(str(folder)), "step_000000007")
    right = saved.values == VALUES and saved.manifest.step == 7
    return right and all(torch.equal(saved.read(name), tensor) for name, tensor in {**WHOLE, **EVERYWHERE}.items())


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "step_000000007").iterdir())


@pytest.mark.parametrize("number", range(3))
def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path, number: int) -> None:
    save(tmp_path, 2)
    path = _files(tmp_path)[number]
    whole = path.read_bytes()
    chance = random.Random(number)
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _reads_right(tmp_path), f"{path.name}: byte {position}"
        except DamagedError:
            refused += 1
    assert refused > 0.4 * len(whole)  # of a part's, those in headers are not needed to read it


@pytest.mark.parametrize("number", range(3))
def test_every_cut_is_refused(tmp_path: Path, number: int) -> None:
    save(tmp_path, 2)
    path = _files(tmp_path)[number]
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError):
            _reads_right(tmp_path)
    path.write_bytes(whole + b"x")
    if path.name != NAME:
        with pytest.raises(DamagedError, match=r"expected .* bytes, found"):
            _reads_right(tmp_path)
    path.unlink()
    with pytest.raises(DamagedError, match="missing"):
        _reads_right(tmp_path)


HOSTILE: list[tuple[str, Any]] = [
    ("parts", {"../../etc/passwd": {"size": 0, "blocks": []}}),
    ("step", -1),
    ("step", True),
    ("world_size", "2"),
    ("tensors", {"x": {"dtype": "F32", "shape": [1 << 60], "pieces": []}}),
    ("tensors", {"x": {"dtype": "OBJECT", "shape": [0], "pieces": []}}),
    ("tensors", {"x": {"dtype": "F32", "shape": [-1], "pieces": []}}),
    ("tensors", []),
    ("values", []),
    ("score", "high"),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_manifest_that_contradicts_itself_is_refused_though_its_hash_is_right(
    tmp_path: Path, key: str, value: Any
) -> None:
    from training.checkpoint.manifest import _hash

    save(tmp_path, 1)
    path = tmp_path / "step_000000007" / NAME
    content = json.loads(path.read_bytes())["content"]
    content[key] = value
    with pytest.raises(DamagedError, match="damaged or no manifest"):
        parse("x", json.dumps({"sha256": _hash(content), "content": content}).encode())
    content = json.loads(path.read_bytes())["content"]
    content["tensors"]["centres"]["pieces"][0]["rows"] = 10  # a row that nobody has
    with pytest.raises(DamagedError, match="10 of 11 rows"):
        parse("x", json.dumps({"sha256": _hash(content), "content": content}).encode())


# ---- which count, which are kept -------------------------------------------------------------------------------


def _kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(place_of(str(tmp_path)), keep=2, keep_best=1)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8), (5, None)):
        save(tmp_path, 2, step, saved=float(step))
        if score is not None:
            checkpoints.rate(f"step_{step:09d}", score)
            checkpoints.tidy(f"step_{step:09d}")
    assert _kept(tmp_path) == [2, 4, 5]
    assert (tmp_path / "best").read_text() == "step_000000002\n"
    assert (tmp_path / "latest").read_text() == "step_000000005\n"
    lines: list[str] = []
    assert [saved.manifest.step for saved in checkpoints.newest_first(lines)] == [5, 4, 2]
    assert lines == []
    (tmp_path / "latest").write_text("step_000000002\n")  # by hand
    assert [saved.manifest.step for saved in checkpoints.newest_first(lines)] == [2, 5, 4]


def test_a_run_that_was_started_over_keeps_its_own(tmp_path: Path) -> None:
    checkpoints = Checkpoints(place_of(str(tmp_path)), keep=2, keep_best=1)
    for saved, step in enumerate((10, 20, 30)):
        save(tmp_path, 1, step, saved=float(saved))
    checkpoints.rate("step_000000020", 0.99)
    checkpoints.claim("ab", over=True)
    lines: list[str] = []
    assert not list(checkpoints.newest_first(lines)), "it goes on from none of the former run's"
    save(tmp_path, 1, 5, saved=3.0, run="other")
    assert _kept(tmp_path) == [5, 30], "a score of the former run keeps nothing"
    assert [saved.manifest.step for saved in checkpoints.newest_first(lines)] == [5], "nor is it fallen back to"
    assert lines == []


def test_of_two_runs_in_a_folder_the_older_one_stops(tmp_path: Path) -> None:
    checkpoints = Checkpoints(place_of(str(tmp_path)), keep=2, keep_best=1)
    checkpoints.claim("aa", over=False)
    checkpoints.claim("bb", over=False)
    told = [write(checkpoints.place, f"step_000000001/{part_of(0, 'aa')}", {"x": torch.zeros(1)})]
    manifest = assembled(told, Facts(step=1, run="r", values={}))
    with pytest.raises(CheckpointError, match="another run has begun to write here"):
        checkpoints.publish("step_000000001", manifest, "aa")
    assert not checkpoints.finished()
    checkpoints.publish("step_000000001", manifest, "bb")
    assert checkpoints.finished() == ["step_000000001"]


class _Flaky(Folder):
    """A file system that has bad minutes."""

    failures = 2

    def read_into(self, name: str, begin: int, into: memoryview) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error", name)
        return super().read_into(name, begin, into)


def test_what_cannot_be_read_is_tried_again_and_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.checkpoint.saved._PAUSES_S", (0.0, 0.0))
    save(tmp_path, 1)
    place = _Flaky(tmp_path)
    assert torch.equal(Saved(place, "step_000000007").read("centres"), WHOLE["centres"])
    place.failures = 100
    with pytest.raises(CheckpointError, match="cannot read it") as error:
        Saved(place, "step_000000007").read("centres")
    assert not isinstance(error.value, DamagedError)


def test_what_a_dead_run_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "step_000000002").mkdir()
    half = tmp_path / "step_000000003"
    half.mkdir()
    (half / part_of(0, "ff")).write_bytes(b"half a part")
    other = tmp_path / "step_000000004"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    save(tmp_path, 1)
    assert _kept(tmp_path) == [4, 7]


def test_the_same_step_again_replaces_it_only_when_it_is_whole(tmp_path: Path) -> None:
    save(tmp_path, 2, token="a1")
    place = place_of(str(tmp_path))
    write(place, f"step_000000007/{part_of(0, 'b2')}", {"centres": Rows(torch.zeros(11, 5), 0, 11)})  # and died
    assert _reads_right(tmp_path)
    save(tmp_path, 3, token="c3")
    assert _reads_right(tmp_path)
    assert len(_files(tmp_path)) == 4


def test_falling_back_says_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(place_of(str(tmp_path)), keep=3, keep_best=0)
    for step in (1, 2, 3):
        save(tmp_path, 1, step, saved=float(step), keep=3)
    _, second = sorted((tmp_path / "step_000000003").iterdir())
    second.unlink()
    (tmp_path / "step_000000002" / NAME).write_bytes(b"{}")
    lines: list[str] = []
    assert [saved.manifest.step for saved in checkpoints.newest_first(lines)] == [1]
    assert "not whole" in lines[0]
    assert "damaged or no manifest" in lines[1]
    (tmp_path / "latest").write_text("../elsewhere\n")
    lines.clear()
    assert [saved.manifest.step for saved in checkpoints.newest_first(lines)] == [1]
    assert "which is not a checkpoint beside it" in lines[0]
