"""SIGKILL of a rank at moments drawn beforehand, a good third of them while a checkpoint is being written."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.surviving.runs import RANKS, STEPS_PER_EPOCH, Recipe, Run, UnexpectedError
from training.checkpoint.manifest import NAME

_STRETCH = 32
"""Steps in which one kill falls."""
_EVERY = 5
"""Steps between two checkpoints: kills come at all distances from one."""
_SAVING = 0.4
_WRITING_S = 0.03
"""What writing of so small a checkpoint takes at least."""


class Kill(NamedTuple):
    """When, and whom."""

    step: int
    """After so many steps, or while the next checkpoint is written."""
    saving: bool
    share: float
    """Of the time of a step, or of writing, that is waited from there on."""
    rank: int


class Killed(NamedTuple):
    """What came of it."""

    step: int
    saving: int
    """Step of the checkpoint that was being written; -1: none was."""
    share: float
    rank: int
    resumed: int
    twice: int
    seconds: float
    """Until the next step was done."""


def plan(kills: int, seed: int) -> list[Kill]:
    """One kill in each stretch of steps."""
    draw = random.Random(seed)
    saving = set(draw.sample(range(kills), math.ceil(kills * _SAVING)))
    return [
        Kill(number * _STRETCH + draw.randint(1, _STRETCH), number in saving, draw.random(), draw.randrange(RANKS))
        for number in range(kills)
    ]


def recipe(data: Path, kills: int) -> Recipe:
    """A training long enough for so many."""
    epochs = math.ceil((kills + 1) * _STRETCH / STEPS_PER_EPOCH)
    more = ("clustering.warmup_fraction=0.1", "clustering.ramp_fraction=0.1", "train.timeout=60")
    return Recipe(data=data, epochs=epochs, checkpoint_steps=_EVERY, more=more)


def strike(run: Run, kills: list[Kill], tell: Callable[[str], None]) -> Iterator[Killed]:
    """Do it, and wait for the end. Raises UnexpectedError."""
    found: list[Killed] = []
    for number, kill in enumerate(kills):
        run.until_step(kill.step - 1)
        ranks = run.ranks()
        saving = _wait_for_writing(run, kill) if kill.saving else _wait_for_step(run, kill)
        known, begin = len(run.events), time.monotonic()
        os.kill(ranks[kill.rank], signal.SIGKILL)
        if NAME in run.files_of(saving):
            saving = -1  # it came to its end just before
        run.look()
        step = run.step
        run.until_gone(set(ranks.values()), 60)
        latest = run.latest
        recovery = run.recovery(known)
        if recovery.resumed != latest:
            raise run.unexpected(f"it went on from step {recovery.resumed}, {latest} was the newest checkpoint")
        if odd := run.said(begin, "WARNING training."):
            raise run.unexpected(f"it said: {odd[0]}")
        one = Killed(step, saving, kill.share, kill.rank, *recovery[:2], recovery.next_step - begin)
        found.append(one)
        tell(
            f"kill {number + 1}/{len(kills)}: rank {one.rank} {doing(one)}; went on from step {one.resumed}, "
            f"{one.twice} steps again, next step after {one.seconds:.1f} s"
        )
        yield one
    run.until_end(600)
    if run.twice() != sum(one.twice for one in found):
        raise UnexpectedError(f"{run.twice()} steps were done twice, {sum(one.twice for one in found)} by the starts")
    if sum(one.saving >= 0 for one in found) * 3 < len(found):
        raise UnexpectedError("fewer than a third of the kills met a checkpoint that was being written")


def doing(kill: Killed) -> str:
    """In words."""
    if kill.saving >= 0:
        return f"after step {kill.step}, writing the checkpoint of step {kill.saving}"
    return f"after step {kill.step} and {kill.share:.2f} of the next"


def _wait_for_step(run: Run, kill: Kill) -> int:
    run.until_step(kill.step)
    time.sleep(kill.share * run.step_seconds)
    return -1


def _wait_for_writing(run: Run, kill: Kill) -> int:
    """Wait until a rank has begun to write a checkpoint, and a little more: that checkpoint's step."""
    while True:
        step = (run.step // _EVERY + 1) * _EVERY
        before = run.files_of(step)  # a run that was killed may have left parts
        run.until_step(step - 1)
        while not (new := run.files_of(step) - before) and run.step < step + _EVERY:
            run.look()
        if new and NAME not in new:
            time.sleep(kill.share * _WRITING_S)
            if NAME not in run.files_of(step):
                return step
        run.look()
