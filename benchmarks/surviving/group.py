"""Faults that end no process: one process group lives through them, and may hold no more at the end than early on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.surviving.disk import Disk, pages
from benchmarks.surviving.runs import RANKS, Recipe, Run
from benchmarks.surviving.samples import Sample, Sampler
from training.checkpoint.folder import folder_of
from training.checkpoint.manifest import NAME

_SAMPLE_S = 3.0
_QUIET_S = (2.0, 6.0)
"""Between two faults."""
_ANEW_S = 200.0
"""In which TensorBoard's writer must have begun anew: it writes every two minutes."""
_CANNOT = "cannot write the checkpoint of step"


class Fault(NamedTuple):
    """One that was lived through."""

    kind: str
    begin: float
    seconds: float
    """From its end, or from its beginning if it has none, until all was as before."""
    twice: int
    """Steps done again."""


class Group(NamedTuple):
    """What came of it."""

    faults: list[Fault]
    samples: list[Sample]
    begin: float
    """Moment from which samples count their seconds."""
    left_out: str
    steps: int
    remains: list[str]
    """Folders of checkpoints that are not whole: failed saves left them."""


def recipe(data: Path, checkpoints: Path) -> Recipe:
    """A training without an end, evaluated every some hundred steps. Clusters are in use from step 80 on."""
    more = (
        *("clustering.warmup_fraction=0.00005", "clustering.ramp_fraction=0.00005", "train.timeout=30"),
        *("eval.sets=[verification.bin]", "eval.every_epochs=15", f"train.checkpoints={checkpoints}"),
    )
    return Recipe(data=data, epochs=100_000, checkpoint_steps=20, more=more)


class _Faults:
    """Each returns the seconds until all was as before; None: it is looked for later."""

    def __init__(self, run: Run, disk: Disk | None, draw: random.Random) -> None:
        self._run, self._disk, self._draw = run, disk, draw
        self._ranks = run.ranks()
        self.later: list[tuple[float, Callable[[], bool]]] = []
        self.kinds: dict[str, Callable[[], float | None]] = {
            "a rank stands still for a while": self._stand_still,
            "log folder is gone for a while": self._no_folder,
            "a file in the log folder's place": self._file_for_folder,
            "TensorBoard's folder is removed": self._no_tensorboard,
        }
        if disk is not None:
            self.kinds["disk of the checkpoints full for one save"] = self._full

    def _stand_still(self) -> float:
        rank = self._ranks[self._draw.randrange(RANKS)]
        os.kill(rank, signal.SIGSTOP)
        time.sleep(self._draw.uniform(0.5, 3))
        os.kill(rank, signal.SIGCONT)
        return self._next_step()

    def _next_step(self) -> float:
        self._run.look()
        begin, known = time.monotonic(), len(self._run.events)
        self._run.wait(lambda: len(self._run.events) > known, 60, "the next step")
        return self._run.events[known].moment - begin

    def _no_folder(self) -> float:
        gone = self._run.output.with_name("gone")
        self._run.output.rename(gone)
        shutil.rmtree(gone)
        time.sleep(self._draw.uniform(1, 4))
        self._run.output.mkdir(exist_ok=True)
        return self._written_again()

    def _file_for_folder(self) -> float:
        away, output = self._run.output.with_name("away"), self._run.output
        output.rename(away)
        output.write_text("no folder\n")
        time.sleep(self._draw.uniform(1, 4))
        output.unlink()
        away.rename(output)
        return self._written_again()

    def _written_again(self) -> float:
        begin = time.monotonic()
        known = _size(self._run.output / "metrics.jsonl")
        metrics = self._run.output / "metrics.jsonl"
        return self._run.wait(lambda: _size(metrics) > known, 60, "a line in metrics.jsonl") - begin

    def _no_tensorboard(self) -> None:
        folder = self._run.output / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.later.append((time.monotonic(), lambda: any(_size(path) for path in folder.glob("events.*"))))

    def _full(self) -> float:
        assert self._disk is not None
        begin = time.monotonic()
        folder = self._run.checkpoints / folder_of(self._run.latest)
        parts = pages([path.stat().st_size for path in folder.iterdir() if path.name != NAME])
        manifest = pages([(folder / NAME).stat().st_size])
        room = self._draw.choice([0, parts // 3, parts - 4096, parts, parts + manifest])
        self._disk.leave(room)
        try:
            self._run.wait(lambda: bool(self._run.said(begin, _CANNOT)), 120, "a save that fails")
        finally:
            self._disk.grow()
        begin, latest = time.monotonic(), self._run.latest
        return self._run.wait(lambda: self._run.latest > latest, 120, "a save that does not fail") - begin


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _dealt(kinds: list[str], draw: random.Random) -> Iterator[str]:
    """All of them in an order that is drawn, again and again."""
    while True:
        yield from draw.sample(kinds, len(kinds))


def live(data: Path, folder: Path, until: float, draw: random.Random, tell: Callable[[str], None]) -> Group:
    """Let a training live through faults until a moment. Raises UnexpectedError."""
    with ExitStack() as stack:
        disk, left_out = None, ""
        try:
            disk = stack.enter_context(Disk(folder / "disk"))
        except OSError as error:
            left_out = f"a full disk: {error}"
        checkpoints = folder / "disk" / "checkpoints"
        output = folder / "group" / "run"
        output.parent.mkdir()
        run = stack.enter_context(Run(recipe(data, checkpoints), output, restarts=0, checkpoints=checkpoints))
        run.until_step(60)
        ranks = run.ranks()
        faults = _Faults(run, disk, draw)
        found: list[Fault] = []
        begin, full = time.monotonic(), 0
        with Sampler(ranks, [output, checkpoints], _SAMPLE_S) as sampler:
            for kind in _dealt(list(faults.kinds), draw):
                _quietly(run, draw.uniform(*_QUIET_S))
                found += _settled(run, faults, tell)
                if time.monotonic() > until:
                    break
                if kind.startswith("TensorBoard") and faults.later:
                    continue
                at = time.monotonic()
                seconds = faults.kinds[kind]()
                full += kind.startswith("disk")
                tell(f"{kind}, at step {run.step}" + ("" if seconds is None else f": as before after {seconds:.1f} s"))
                if seconds is not None:
                    found.append(Fault(kind, at, seconds, 0))
            while faults.later:
                _quietly(run, 1)
                found += _settled(run, faults, tell)
        if run.ranks() != ranks or sum(event.is_start for event in run.events) != 1:
            raise run.unexpected("its ranks are others than at the beginning")
        if len(failed := run.said(begin, _CANNOT)) != full:
            raise run.unexpected(f"{full} saves should have failed, {len(failed)} have")
        _stop(run)
        whole = {folder_of(step) for step in run.whole()}
        remains = sorted(path.name for path in checkpoints.glob("step_*") if path.name not in whole)
        return Group(found, sampler.samples, begin, left_out, run.step, remains)


def _quietly(run: Run, seconds: float) -> None:
    """Some seconds in which nothing happens to it; it must not end by itself."""
    begin = time.monotonic()
    run.wait(lambda: time.monotonic() - begin > seconds, 2 * seconds + 5, "time to pass")


def _settled(run: Run, faults: _Faults, tell: Callable[[str], None]) -> list[Fault]:
    """Those that were looked for later, and are over."""
    found = []
    for begin, is_over in list(faults.later):
        seconds = time.monotonic() - begin
        if is_over():
            faults.later.remove((begin, is_over))
            found.append(Fault("TensorBoard's folder is removed", begin, seconds, 0))
            tell(f"TensorBoard's folder: there again after {seconds:.1f} s")
        elif seconds > _ANEW_S:
            raise run.unexpected(f"TensorBoard's folder is not there again after {seconds:.0f} s")
    return found


def _stop(run: Run) -> None:
    """An orderly end: with a checkpoint of its last step, and nothing left running."""
    begin = time.monotonic()
    run.launch.process.terminate()
    run.until_gone(set(run.launch.alive()), 60)
    if not run.said(begin, f"stopped by SIGTERM after {run.latest} of"):
        raise run.unexpected(f"it was stopped, but its newest checkpoint is of step {run.latest}")
