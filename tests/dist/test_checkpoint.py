"""Checkpoints: what is saved comes back bit for bit, `latest` only names whole ones, and misfits are refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool, ranks_of
from training.checkpoint import CheckpointError, CheckpointFolder, check_same_checkpoint, refuse_another_run


def _save_three(group: dist.ProcessGroup, output: Path) -> list[float]:
    folder = CheckpointFolder(output, ranks_of(group), keep=2)
    rank = dist.get_rank(group)
    for step in (5, 10, 15):
        folder.save(step, {"value": torch.tensor([rank + step / 100]), "nested": {"list": [1, 2.5, "x", None]}})
    path = folder.latest()
    assert path is not None
    state = folder.load(path)
    assert state["step"] == 15
    assert state["nested"] == {"list": [1, 2.5, "x", None]}
    return state["value"].tolist()


def _save_steps(group: dist.ProcessGroup, output: Path, steps: list[int]) -> str:
    folder = CheckpointFolder(output, ranks_of(group), keep=2)
    for step in steps:
        folder.save(step, {"from": steps[0]})
    path = folder.latest()
    return "" if path is None else f"{path.name} of {folder.load(path)['from']}"


def test_a_run_that_was_started_over_keeps_its_own_checkpoints(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, _save_steps, tmp_path, [10, 20, 30]) == ["step_000000030 of 10"] * 2
    assert ranks.run(2, _save_steps, tmp_path, [5]) == ["step_000000005 of 5"] * 2
    assert ranks.run(2, _save_steps, tmp_path, [9, 15]) == ["step_000000015 of 9"] * 2
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_000000009", "step_000000015"]


def _latest_and_load(group: dist.ProcessGroup, output: Path) -> str:
    folder = CheckpointFolder(output, ranks_of(group), keep=2)
    try:
        path = folder.latest()
        if path is None:
            return "none"
        folder.load(path)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("world_size", [1, 2])
def test_round_trip_and_pruning(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    values = ranks.run(world_size, _save_three, tmp_path)
    assert values == [pytest.approx([rank + 0.15]) for rank in range(world_size)]
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_000000010", "step_000000015"]
    assert (folder / "latest").read_text().strip() == "step_000000015"


def _save_without_a_part(group: dist.ProcessGroup, output: Path) -> str:
    """As on hosts that share no file system: rank 1 writes elsewhere."""
    ranks = ranks_of(group)
    folder = CheckpointFolder(output if ranks.is_main else output / "elsewhere", ranks, keep=2)
    if not ranks.is_main:
        (output / "elsewhere").mkdir()
    try:
        if ranks.is_main:
            folder.save(20, {})
        else:
            folder._write(folder.folder / "step_000000020.partial", 20, {})
            ranks.barrier()
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_checkpoint_without_all_its_parts_does_not_count(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _save_three, tmp_path)
    assert "rank_1.pt is missing: put train.output on a file system" in ranks.run(2, _save_without_a_part, tmp_path)[0]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_000000015"
    assert ranks.run(2, _latest_and_load, tmp_path) == ["loaded"] * 2


def _save_to_a_full_disk(group: dist.ProcessGroup, output: Path) -> str:
    from unittest import mock

    folder = CheckpointFolder(output, ranks_of(group), keep=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("training.checkpoint.os.fsync", side_effect=full), pytest.raises(CheckpointError) as error:
        folder.save(20, {})
    return str(error.value)


def test_a_full_disk_is_one_line_and_leaves_the_former_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, _save_three, tmp_path)
    (message,) = ranks.run(1, _save_to_a_full_disk, tmp_path)
    assert "cannot write the checkpoint of step 20 (No space left on device)" in message
    assert ranks.run(1, _latest_and_load, tmp_path) == ["loaded"]


def test_another_number_of_ranks_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _save_three, tmp_path)
    (message,) = ranks.run(1, _latest_and_load, tmp_path)
    assert "was written by 2 ranks, this run has 1: start it with 2 ranks" in message


def test_a_save_that_died_half_way_is_not_seen(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, _latest_and_load, tmp_path) == ["none"]
    ranks.run(1, _save_three, tmp_path)
    half = tmp_path / "checkpoints" / "step_000000020.partial"
    half.mkdir()
    (half / "rank_0.pt").write_bytes(b"half a file")
    assert ranks.run(1, _latest_and_load, tmp_path) == ["loaded"]


def test_damage_and_code_in_a_checkpoint_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, _save_three, tmp_path)
    part = tmp_path / "checkpoints" / "step_000000015" / "rank_0.pt"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a checkpoint" in ranks.run(1, _latest_and_load, tmp_path)[0]
    torch.save(
        {"step": 1, "world_size": 1, "path": Path("x")}, part
    )  # an object outside the allow-list of weights_only
    message = ranks.run(1, _latest_and_load, tmp_path)[0]
    assert "damaged or not a checkpoint" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["step_000000099", "../elsewhere", ""])
def test_latest_that_names_no_checkpoint_is_an_error(ranks: RankPool, tmp_path: Path, name: str) -> None:
    ranks.run(1, _save_three, tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text(name + "\n")
    assert "which is not a checkpoint beside it" in ranks.run(1, _latest_and_load, tmp_path)[0]


def _agree(group: dist.ProcessGroup, steps: list[int | None]) -> str:
    step = steps[dist.get_rank(group)]
    try:
        check_same_checkpoint(None if step is None else Path(f"x/step_{step:09d}"), ranks_of(group))
    except CheckpointError as error:
        return str(error)
    return "agreed"


def test_ranks_that_see_different_checkpoints_stop_instead_of_hanging(ranks: RankPool) -> None:
    for steps in ([None] * 4, [1200] * 4):
        assert ranks.run(4, _agree, steps) == ["agreed"] * 4
    for steps, said in (([7, 7, 9, 7], "step 7 and step 9"), ([None, 9, 9, 9], "no checkpoint and step 9")):
        messages = ranks.run(4, _agree, steps)
        assert all(f"ranks see different checkpoints ({said})" in message for message in messages)


def test_a_changed_setting_is_named_and_free_ones_pass() -> None:
    saved = {"head": {"margin": 0.5}, "train": {"epochs": 2, "log_steps": 50}}
    refuse_another_run(Path("x"), saved, {"head": {"margin": 0.5}, "train": {"epochs": 2, "log_steps": 5}})
    with pytest.raises(CheckpointError, match=r"head\.margin = 0\.5, this run has 0\.4"):
        refuse_another_run(Path("x"), saved, {"head": {"margin": 0.4}})
    with pytest.raises(CheckpointError, match=r"by a version of this program without head\.scale"):
        refuse_another_run(Path("x"), saved, {"head": {"margin": 0.5, "scale": 64.0}})
