"""Checkpoints of several ranks: written beside training, counted only when all are there, gone on from alike by all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from configs.schema import TrainConfig
from sharding import Rows, shard_of
from tests.ranks import RankPool, ranks_of
from training.checkpoint import CheckpointError, Checkpoints, Saved, Saver, Written, place_of
from training.checkpoint.manifest import Facts
from training.checkpoint.part import write
from training.checkpoint.same_run import refuse_another_run
from training.checkpoint.saver import _SIGN
from training.checkpointing import RunCheckpoints
from training.showing.metrics import RunLog

ROWS = 11
X = torch.arange(ROWS * 3, dtype=torch.float32).view(ROWS, 3)


def _facts(step: int, values: dict[str, Any] | None = None) -> Facts:
    return Facts(step=step, run="r", values=values or {})


def _saver(group: dist.ProcessGroup, output: Path, token: str = "ab") -> Saver:
    checkpoints = Checkpoints(place_of(str(output)), keep=2, keep_best=0)
    return Saver(checkpoints, ranks_of(group), token)


def _rows(group: dist.ProcessGroup) -> Rows:
    shard = shard_of(dist.get_rank(group), dist.get_world_size(group), ROWS)
    return Rows(X[shard.start : shard.stop].clone(), shard.start, ROWS)


def _save_three(group: dist.ProcessGroup, output: Path) -> list[str]:
    saver, rows = _saver(group, output), _rows(group)
    told: list[Written | None] = []
    for step in (5, 10, 15):
        told.append(saver.finish())
        saver.save({"x": rows, "whole": torch.full((2,), float(step))}, _facts(step, {"step": step}))
        rows.tensor.add_(1)  # training goes on at once: the copy is what is written
    told.append(saver.finish())
    assert saver.finish() is None
    saver.close()
    return [written.error for written in told if written is not None]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_was_there_when_save_was_called_is_written(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    assert ranks.run(world_size, _save_three, tmp_path) == [["", "", ""]] * world_size
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000000010", "step_000000015"]
    assert (tmp_path / "latest").read_text() == "step_000000015\n"
    for number, step in enumerate((10, 15), start=1):
        saved = Saved(place_of(str(tmp_path)), f"step_{step:09d}")
        assert torch.equal(saved.read("x"), X + number)
        assert saved.read("whole").tolist() == [step, step]
        assert (saved.manifest.step, saved.manifest.world_size, saved.values) == (step, world_size, {"step": step})


def _save_on_a_full_disk(group: dist.ProcessGroup, output: Path, full: int) -> list[Any]:
    """Rank `full` has no room."""
    saver = _saver(group, output, "cd")
    error = OSError(errno.ENOSPC, "No space left on device", "a part")
    failing = mock.patch("training.checkpoint.saver.write", side_effect=error)
    with failing if dist.get_rank(group) == full else contextlib.nullcontext():
        saver.save({"x": _rows(group)}, _facts(20))
        written = saver.finish()
    saver.save({"x": _rows(group)}, _facts(25))
    after = saver.finish()
    saver.close()
    assert written is not None
    assert after is not None
    return [written.error, after.error]


@pytest.mark.parametrize("full", [0, 1])
def test_one_full_disk_is_one_line_on_all_ranks_and_the_next_is_written(
    ranks: RankPool, tmp_path: Path, full: int
) -> None:
    ranks.run(2, _save_three, tmp_path)
    for error, after in ranks.run(2, _save_on_a_full_disk, tmp_path, full):
        assert error == f"rank {full}: a part: No space left on device: make room or mend the folder"
        assert after == ""
    assert not (tmp_path / "step_000000020").exists(), "what was written of it has made room"
    assert torch.equal(Saved(place_of(str(tmp_path)), "step_000000025").read("x"), X)


def _save_elsewhere(group: dist.ProcessGroup, output: Path) -> str:
    """As on hosts that share no file system."""
    written = None
    saver = _saver(group, output / str(dist.get_rank(group)))
    saver.save({"x": _rows(group)}, _facts(20))
    written = saver.finish()
    assert written is not None
    return written.error


def test_hosts_that_share_no_file_system_are_told(ranks: RankPool, tmp_path: Path) -> None:
    for error in ranks.run(2, _save_elsewhere, tmp_path):
        assert "expected the part of every rank" in error
        assert "on a file system that all hosts share" in error
    assert not list(tmp_path.rglob("latest"))


def _save_and_leave(group: dist.ProcessGroup, output: Path) -> bool:
    """Rank 1 never writes; the others' threads wait, and keep nobody."""
    saver = _saver(group, output, "ef")
    if dist.get_rank(group) == 1:
        return True
    saver.save({"x": _rows(group)}, _facts(30))
    threads = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    return len(threads) == 1 and threads[0].daemon


def test_a_save_that_one_rank_never_ends_does_not_count(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _save_three, tmp_path)
    assert ranks.run(2, _save_and_leave, tmp_path) == [True, True]
    assert (tmp_path / "latest").read_text() == "step_000000015\n"
    ranks.close()  # with the threads that wait


def _save_where_nothing_can_be_removed(group: dist.ProcessGroup, output: Path) -> list[str]:
    saver = _saver(group, output, "aa")
    failing = mock.patch(
        "training.checkpoint.places.Folder.remove", side_effect=OSError(errno.EIO, "Input/output error")
    )
    with failing:
        saver.save({"x": _rows(group)}, _facts(20))
        written = saver.finish()
        saver.close()
    assert written is not None
    return [written.error]


def test_a_checkpoint_that_counts_stays_whatever_fails_after_that(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _save_three, tmp_path)
    assert ranks.run(2, _save_where_nothing_can_be_removed, tmp_path) == [[""], [""]]
    assert torch.equal(Saved(place_of(str(tmp_path)), "step_000000020").read("x"), X)


def _save_and_hear_nothing(group: dist.ProcessGroup, output: Path) -> str:
    """Rank 1 loses the store when it waits for the outcome."""
    saver = _saver(group, output, "bb")
    waits = mock.patch.object(saver, "_wait", side_effect=RuntimeError("the store is gone"))
    with waits if dist.get_rank(group) else contextlib.nullcontext():
        saver.save({"x": _rows(group)}, _facts(20))
        written = saver.finish()
        saver.close()
    assert written is not None
    return written.error


def test_a_rank_that_does_not_hear_the_outcome_leaves_its_part(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, _save_and_hear_nothing, tmp_path)
    assert first == ""
    assert "the store is gone" in second
    assert torch.equal(Saved(place_of(str(tmp_path)), "step_000000020").read("x"), X)


def _save_slowly(group: dist.ProcessGroup, output: Path) -> int:
    """Rank 1's file system takes long; how often rank 0's monitor heard that this is progress."""
    saver, moved = _saver(group, output, "cc"), []
    saver._ranks.monitor.moved = lambda: moved.append(1)  # type: ignore[method-assign, assignment]

    def slow(place: Any, name: str, rows: Any, each: Any) -> Any:
        for _ in range(4 * _SIGN):
            time.sleep(0.02)
            each()
        return write(place, name, rows)

    with mock.patch("training.checkpoint.saver.write", slow) if dist.get_rank(group) else contextlib.nullcontext():
        saver.save({"x": _rows(group)}, _facts(20))
        written = saver.finish()
        saver.close()
    assert written is not None
    assert written.error == ""
    return len(moved)


def test_waiting_for_a_slow_rank_is_progress_while_it_writes(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, _save_slowly, tmp_path)
    assert first >= 2
    assert second >= 4


# ---- going on --------------------------------------------------------------------------------------------------


class _State:
    """In the place of a run: one sharded tensor."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rows, self.group = _rows(group), group

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"x": self.rows}, {}

    def restore(self, saved: Saved) -> None:
        self.rows.tensor.copy_(saved.read("x", self.rows.start, self.rows.start + len(self.rows.tensor)))


def _resume(group: dist.ProcessGroup, output: Path, settings: Any = None, resume: bool = True) -> str:
    """Step and numbers that this rank goes on with, or what was refused."""
    state = _State(group)
    state.rows.tensor.zero_()
    config = TrainConfig(output=str(output), keep_checkpoints=3)
    checkpoints = RunCheckpoints(config, ranks_of(group), state, settings or {})  # type: ignore[arg-type]
    try:
        saved = checkpoints.start(resume=resume)
    except CheckpointError as error:
        return str(error)
    if saved is None:
        return "none"
    return f"step {saved.manifest.step}: {state.rows.tensor.sum().item():g}"


def _run(group: dist.ProcessGroup, output: Path, steps: list[int], settings: Any = None) -> None:
    state = _State(group)
    config = TrainConfig(output=str(output), keep_checkpoints=3)
    ranks = ranks_of(group)
    checkpoints = RunCheckpoints(config, ranks, state, settings or {})  # type: ignore[arg-type]
    checkpoints.start(resume=False)
    log = RunLog(output, active=False, total_steps=9, first_step=0)
    for step in steps:
        state.rows.tensor.copy_(_rows(group).tensor + step)
        checkpoints.save(step, dict, log)
    checkpoints.save(steps[-1], dict, log, last=True)


def _sums(world_size: int, step: int) -> list[str]:
    shards = [shard_of(rank, world_size, ROWS) for rank in range(world_size)]
    return [f"step {step}: {(X + step)[s.start : s.stop].sum().item():g}" for s in shards]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 4), (4, 1)])
def test_any_number_of_ranks_goes_on(ranks: RankPool, tmp_path: Path, before: int, after: int) -> None:
    assert ranks.run(after, _resume, tmp_path) == ["none"] * after
    ranks.run(before, _run, tmp_path, [1, 2])
    assert ranks.run(after, _resume, tmp_path) == _sums(after, 2)


def test_the_newest_whole_one_is_taken_by_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, _run, tmp_path, [1, 2, 3])
    folder = tmp_path / "checkpoints"
    part = next((folder / "step_000000003").glob("rank_00001-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1  # rank 0 does not read it
    part.write_bytes(content)
    assert ranks.run(2, _resume, tmp_path) == _sums(2, 2)
    next((folder / "step_000000002").glob("rank_00000-*")).unlink()
    assert ranks.run(2, _resume, tmp_path) == _sums(2, 1)
    (folder / "step_000000001" / "manifest.json").write_text("{}")
    for said in ranks.run(2, _resume, tmp_path):
        assert "none of its 3 checkpoints is whole" in said
    (folder / "latest").unlink()
    for said in ranks.run(2, _resume, tmp_path):
        assert "none of its 3 checkpoints is whole" in said, "half of one is in memory by now: no start from step 0"


def _restarted(group: dist.ProcessGroup, output: Path) -> str:
    """As ranks that torchrun has started anew: on this host only."""
    restarts = "1" if dist.get_rank(group) == 0 else "0"
    with mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": restarts}):
        return _resume(group, output, None, False)


def test_a_restart_goes_on_from_its_own_run_alone(ranks: RankPool, tmp_path: Path) -> None:
    """Each host counts its own restarts; a run that starts over leaves the former one's checkpoints alone."""
    ranks.run(2, _run, tmp_path, [3])
    assert ranks.run(2, _resume, tmp_path, None, False) == ["none"] * 2
    assert ranks.run(2, _restarted, tmp_path) == ["none"] * 2, "it has written none itself"
    ranks.run(2, _run, tmp_path, [1])
    assert ranks.run(2, _restarted, tmp_path) == _sums(2, 1)


def test_a_run_that_never_finished_one_starts(ranks: RankPool, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / "step_000000003"
    half.mkdir(parents=True)
    (half / "rank_00000-ab.safetensors").write_bytes(b"half")
    assert ranks.run(2, _resume, tmp_path) == ["none"] * 2


def _resume_apart(group: dist.ProcessGroup, outputs: list[Path]) -> str:
    return _resume(group, outputs[dist.get_rank(group)])


def test_ranks_that_see_different_checkpoints_stop_instead_of_hanging(ranks: RankPool, tmp_path: Path) -> None:
    for name, steps in (("a", [7]), ("b", [7, 9]), ("c", [9])):
        ranks.run(1, _run, tmp_path / name, steps)
    a, b, c, none = (tmp_path / name for name in ("a", "b", "c", "none"))
    for outputs, said in (([a, b], "step 7 and step 9"), ([none, b], "no checkpoint and step 9"),
                          ([b, c], "step 9 and step 9")):  # fmt: skip
        for message in ranks.run(2, _resume_apart, outputs):
            assert f"ranks see different checkpoints ({said})" in message


def test_another_run_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, _run, tmp_path, [3], {"optim": {"lr": 0.1}})
    assert ranks.run(1, _resume, tmp_path, {"optim": {"lr": 0.1}}) == _sums(1, 3)
    (said,) = ranks.run(1, _resume, tmp_path, {"optim": {"lr": 0.2}})
    assert "was written with optim.lr = 0.1, this run has 0.2" in said


def test_a_changed_setting_is_named_and_free_ones_pass() -> None:
    saved = {"head": {"margin": 0.5}, "train": {"epochs": 2, "log_steps": 50}, "step": {"images": 24}}
    refuse_another_run("x", saved, {"head": {"margin": 0.5}, "train": {"epochs": 2, "log_steps": 5}})
    with pytest.raises(CheckpointError, match=r"head\.margin = 0\.5, this run has 0\.4"):
        refuse_another_run("x", saved, {"head": {"margin": 0.4}})
    with pytest.raises(CheckpointError, match=r"by a version of this program without head\.scale"):
        refuse_another_run("x", saved, {"head": {"margin": 0.5, "scale": 64.0}})
    with pytest.raises(CheckpointError, match=r"steps were of 24 images, this run's are of 18 .*global_batch=24"):
        refuse_another_run("x", saved, {"step": {"images": 18}})


def test_a_file_in_the_place_of_the_folder_is_one_line(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    (said,) = ranks.run(1, _resume, tmp_path)
    assert "cannot read it" in said
    assert json.dumps(said).count("\\n") == 0
    assert os.path.isfile(tmp_path / "checkpoints")
