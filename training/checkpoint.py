"""Checkpoints: everything a run needs to go on as if it had never stopped, on the same number of ranks.

    <output>/checkpoints/step_000001200/rank_0.pt rank_1.pt …   and   <output>/checkpoints/latest

Every rank writes all that it holds: class centres, their momentum, bank, cluster state and random state, which are its
own, and the backbone, which all share. A checkpoint is written under a temporary name, brought to the disk, renamed,
and only then named by `latest`: a run that dies while saving leaves the former checkpoint whole.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from data.files import synced
from partial_fc.collectives import extremes
from training.distributed import Ranks

_LATEST = "latest"
_KEYS = {"step", "world_size"}


class CheckpointError(RuntimeError):
    """A checkpoint is missing a part, damaged, or belongs to another kind of run."""


class CheckpointFolder:
    """Writes, finds, reads and prunes the checkpoints of one run."""

    def __init__(self, output: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = output / "checkpoints", ranks, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write this rank's state; the checkpoint counts once all ranks have. Two barriers.

        Raises CheckpointError when the file system refuses; the former checkpoint is then still whole.
        """
        final = self.folder / f"step_{step:09d}"
        partial = final.with_suffix(".partial")
        try:
            self._write(partial, step, state)
            self.ranks.barrier()
            if self.ranks.is_main:
                self._publish(partial, final)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or partial}: cannot write the checkpoint of step {step} ({error.strerror}): make "
                "room or mend the folder; the same command goes on from the checkpoint before"
            ) from None
        self.ranks.barrier()
        return final

    def _write(self, partial: Path, step: int, state: dict[str, Any]) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / self._part(self.ranks.rank)).open("wb") as file:
            torch.save({"world_size": self.ranks.world_size, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _part(rank: int) -> str:
        return f"rank_{rank}.pt"

    def _publish(self, partial: Path, final: Path) -> None:
        mine = {self._part(rank) for rank in range(self.ranks.world_size)}
        there = {part.name for part in partial.iterdir()}
        if missing := sorted(mine - there):
            raise CheckpointError(
                f"{partial}: expected the part of every rank, {missing[0]} is missing: put train.output on a file "
                "system that all hosts share"
            )
        for name in there - mine:  # left by a run of more ranks that died while saving this step
            (partial / name).unlink()
        shutil.rmtree(final, ignore_errors=True)  # the same step of a run that was started over
        synced(partial)
        partial.rename(final)
        self._point_latest_at(final)
        self._prune(final)

    def _point_latest_at(self, final: Path) -> None:
        new = self.folder / f"{_LATEST}.new"
        new.write_text(final.name + "\n", encoding="utf-8")
        synced(new)
        new.replace(self.folder / _LATEST)
        synced(self.folder)

    def _prune(self, newest: Path) -> None:
        for partial in self.folder.glob("step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        # By age, not by step: a run that was started over, or went on from an older step, counts from less again.
        others = [path for path in self.folder.glob("step_*") if path.is_dir() and path != newest]
        others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        for old in others[: max(0, len(others) - self.keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Path | None:
        """Folder that `latest` names, or None when there is no checkpoint yet."""
        pointer = self.folder / _LATEST
        if not pointer.is_file():
            return None
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{pointer}: cannot read it ({error}): write the name of a step_… folder into it"
            ) from None
        path = self.folder / name
        if not re.fullmatch(r"step_\d+", name) or not path.is_dir():
            raise CheckpointError(
                f"{pointer}: names {name!r}, which is not a checkpoint beside it: write the name of an existing "
                "step_… folder into it, or use --set train.resume=false"
            )
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """This rank's state. Raises CheckpointError when it does not fit this run or is damaged. No collective."""
        part = path / self._part(self.ranks.rank)
        found = len(list(path.glob("rank_*.pt")))
        if found != self.ranks.world_size:
            raise CheckpointError(
                f"{path}: was written by {found} ranks, this run has {self.ranks.world_size}: "
                f"start it with {found} ranks, or use --set train.resume=false or another train.output"
            )
        try:
            state = torch.load(part, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not state.keys() >= _KEYS:
                raise RuntimeError(f"expected {', '.join(sorted(_KEYS))} in it")
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{part}: damaged or not a checkpoint ({(str(error) or type(error).__name__).splitlines()[0]}): "
                f"write the name of an older step_… folder into {path.parent / _LATEST}"
            ) from None
        return state


def check_same_checkpoint(path: Path | None, ranks: Ranks) -> None:
    """Raise CheckpointError, on all ranks, unless all are about to go on from the same step. One all-reduce.

    Ranks that started at different steps would run different collectives and wait for each other for ever.
    """
    step = -1 if path is None else int(path.name.removeprefix("step_"))
    oldest, newest = extremes(step, ranks.group, ranks.device)
    if newest != oldest:
        said = "no checkpoint" if oldest < 0 else f"step {oldest}"
        raise CheckpointError(
            f"ranks see different checkpoints ({said} and step {newest}): expected train.output on a file system that "
            "all hosts share, or with the same checkpoint on each"
        )


# A checkpoint may be continued with other values of these; a change of anything else makes it another run.
_FREE_TO_CHANGE = {
    "train": {"output", "resume", "stop_after_steps", "log_steps", "histogram_steps", "checkpoint_steps",
              "keep_checkpoints", "cpu_threads"},
    "data": {"path", "cache", "cache_gb", "backend", "threads", "prefetch", "max_bad_images"},
    "eval": {"sets", "every_epochs", "batch_size"},
    "head": {"impl"},
    "clustering": {"step_budget", "block"},
}  # fmt: skip


def refuse_another_run(path: Path, saved: dict[str, dict[str, Any]], mine: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError, naming the first setting that differs, unless `saved` and `mine` are the same run.

    Both: settings by section and name, as `configs.load.to_dict` gives them, with any further facts that must
    agree (classes, samples) as a section of their own.
    """
    for section, values in mine.items():
        for key, now in values.items():
            if key in _FREE_TO_CHANGE.get(section, ()):
                continue
            if key not in saved.get(section, {}):
                raise CheckpointError(
                    f"{path}: was written by a version of this program without {section}.{key}: choose another "
                    "train.output, or start over with --set train.resume=false"
                )
            was = saved[section][key]
            if was != now:
                raise CheckpointError(
                    f"{path}: was written with {section}.{key} = {was!r}, this run has {now!r}: set it back, choose "
                    "another train.output, or start over with --set train.resume=false"
                )
