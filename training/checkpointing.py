"""The checkpoints of a run: written beside it, told about, gone on from."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from configs.schema import TrainConfig
from partial_fc.collectives import extremes
from sharding import Rows
from training.checkpoint import CheckpointError, Checkpoints, DamagedError, Saved, Saver, Written, place_of
from training.checkpoint.folder import LATEST, NONE, folder_of
from training.checkpoint.manifest import Facts
from training.checkpoint.places import Place
from training.checkpoint.same_run import refuse_another_run
from training.distributed import Ranks, is_restart
from training.run_state import RunState
from training.showing.metrics import RunLog

_log = logging.getLogger(__name__)

_FINE, _DAMAGED, _REFUSED = range(3)
_MOST_FAILURES = 2
"""Saves that fail in a row before the training ends: one may be a file system's bad minute."""


def place_for(config: TrainConfig) -> Place:
    """Where the checkpoints of a run are. Raises CheckpointError for an address that nothing here can reach."""
    return place_of(config.checkpoints or os.path.join(config.output, "checkpoints"))


class RunCheckpoints:
    """All ranks make one and call it alike."""

    def __init__(self, config: TrainConfig, ranks: Ranks, state: RunState, settings: dict[str, dict[str, Any]]) -> None:
        """settings: with the facts that must agree, see `refuse_another_run`. One all-reduce."""
        self._ranks, self._state, self._settings = ranks, state, settings
        self.folder = Checkpoints(place_for(config), keep=config.keep_checkpoints, keep_best=config.keep_best)
        _, newest = extremes(int.from_bytes(os.urandom(6), "big"), ranks.group, ranks.device)
        self._token = self._run = f"{newest:012x}"
        self._saver = Saver(self.folder, ranks, self._token)
        self._saved, self._failures, self._resumed = -1, 0, 0
        self._evaluation: tuple[int, float | None] = (-1, None)
        self._latest: Written | None = None
        self._blocked, self._fault = 0.0, ""
        self._counts = False

    def start(self, *, resume: bool) -> Saved | None:
        """Resume or start over; from here on this run alone writes here. One all-reduce, and those of `resume`.

        Ranks that torchrun has started anew resume either way: what their own run has written.
        """
        _, restarted = extremes(int(is_restart()), self._ranks.group, self._ranks.device)  # each host counts its own
        saved = self.resume() if resume or restarted else None
        if self._ranks.is_main:
            with contextlib.suppress(OSError):  # a place that cannot be written to is told of by the first save
                self.folder.claim(self._token, over=saved is None)
        return saved

    def resume(self) -> Saved | None:
        """Become what the newest whole checkpoint holds; None where there is none at all.

        Says of each that is damaged that it is left out. Raises CheckpointError, on all ranks: when it is of another
        run, when ranks see different ones, or when there are some and none is whole. Three all-reduces for each.
        """
        lines: list[str] = []
        self._resumed += 1
        tried = 0
        try:
            candidates = self.folder.newest_first(lines)
            while True:
                saved = next(candidates, None)
                self._say(lines)
                self._check_same(saved)
                if saved is None:
                    break
                tried += 1
                if self._all_restored(saved):
                    self._saved, self._run = saved.manifest.step, saved.manifest.run
                    return saved
            over = self.folder.pointer(LATEST) == NONE
            there = [] if over else self.folder.finished()
        except OSError as error:
            raise CheckpointError(f"{self.folder.place.address}: cannot read it ({error.strerror or error})") from None
        if there or tried:
            raise CheckpointError(
                f"{self.folder.place.address}: none of its {max(len(there), tried)} checkpoints is whole, see above: "
                "bring one back, choose another train.output, or start over with --set train.resume=false"
            )
        return None

    def _all_restored(self, saved: Saved) -> bool:
        """Whether all ranks have restored it; False when it is damaged on one. One all-reduce."""
        saved.each = self._ranks.monitor.moved
        code, error = _FINE, ""
        try:
            refuse_another_run(saved.address, saved.values["settings"], self._settings)
            self._state.restore(saved)
        except DamagedError as raised:
            code, error = _DAMAGED, str(raised)
        except CheckpointError as raised:
            code, error = _REFUSED, str(raised)
        except KeyError as raised:
            code, error = _REFUSED, f"{saved.address}: not a checkpoint of this program, {raised} is not in it"
        _, worst = extremes(code, self._ranks.group, self._ranks.device)
        if worst == _REFUSED:
            raise CheckpointError(error or f"{saved.address}: another rank cannot go on from it")
        if worst == _DAMAGED:
            self._say([f"{error or f'{saved.address}: damaged, as another rank says'}: an older one is looked for"])
        return worst == _FINE

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            if self._ranks.first_to_say(f"{self._resumed} {line}"):
                _log.warning("%s", line)
        lines.clear()

    def _check_same(self, saved: Saved | None) -> None:
        """Ranks that went on from different steps would run different collectives and wait for each other for ever."""
        step, mark = (-1, 0) if saved is None else (saved.manifest.step, saved.mark)
        oldest, newest = extremes(step, self._ranks.group, self._ranks.device)
        low, high = extremes(mark, self._ranks.group, self._ranks.device)
        if newest != oldest or low != high:
            said = "no checkpoint" if oldest < 0 else f"step {oldest}"
            raise CheckpointError(
                f"{self.folder.place.address}: ranks see different checkpoints ({said} and step {newest}): expected "
                "it on a file system that all hosts share"
            )

    def collect(self, step: int, values: dict[str, Any]) -> tuple[dict[str, Rows | Tensor], Facts]:
        """The state after `step` steps as a checkpoint has it. No collective. values: see `save`."""
        tensors, state = self._state.collect()
        held = {"settings": self._settings, "state": state, "run": values}
        return tensors, Facts(step=step, run=self._run, values=held)

    def save(self, step: int, values: Callable[[], dict[str, Any]], log: RunLog, *, last: bool = False) -> None:
        """Begin to save the state after `step` steps, unless it is saved; `last`: wait until it counts. No collective.

        values: counts of the run that belong to it, as JSON has them. Raises CheckpointError, on all ranks, when saves
        fail: the last, or `_MOST_FAILURES` in a row.
        """
        began = time.perf_counter()
        self._heard(self._saver.finish(), log)  # ranks may have heard of it at different times: now all have
        self._refuse(_MOST_FAILURES)
        if step != self._saved:
            tensors, facts = self.collect(step, values())
            evaluated, score = self._evaluation
            if evaluated == step:
                facts = replace(facts, score=score, evaluated=True)
            self._saver.save(tensors, facts)
            self._saved = step
        self._blocked = time.perf_counter() - began
        if last:
            self._heard(self._saver.finish(), log)
            self._refuse(1)
            self._saver.close()

    def has_one(self, log: RunLog) -> bool:
        """Whether there is a checkpoint of this run to go back to. Waits for a save under way; no collective."""
        self._heard(self._saver.finish(), log)
        return self._counts

    def listen(self, log: RunLog) -> None:
        """Tell of a save that has ended, if one has."""
        if self._saver.done:
            self._heard(self._saver.finish(), log)

    def statistics(self) -> dict[str, float]:
        """Scalars for the log, of the newest save that counts."""
        if (written := self._latest) is None:
            return {}
        return {
            "checkpoint/seconds_blocked": self._blocked,
            "checkpoint/seconds": written.seconds,
            "checkpoint/gigabytes_per_rank": written.nbytes / 1e9,
        }

    def rate(self, step: int, score: float | None, log: RunLog) -> None:
        """The evaluation after this step is done: its checkpoint gets the score, be it there or not. Rank 0's counts.

        Waits for a save of this step.
        """
        self._evaluation = (step, score)
        if step != self._saved:
            return
        self._heard(self._saver.finish(), log)
        self._saver.close()
        if self._ranks.is_main and self._saved == step:
            folder = folder_of(step)
            if log.attempt("checkpoints", lambda: self.folder.rate(folder, score)):
                self.folder.tidy(folder)

    def _heard(self, written: Written | None, log: RunLog) -> None:
        if written is None:
            return
        if not written.error:
            self._failures, self._counts, self._latest = 0, True, written
            return
        self._failures += 1
        self._saved = -1
        self._fault = f"cannot write the checkpoint of step {written.step} ({written.error})"
        if self._failures < _MOST_FAILURES:
            log.say(f"{self._fault}; training goes on, and the next one is tried")

    def _refuse(self, failures: int) -> None:
        if self._failures >= failures:
            raise CheckpointError(f"{self._fault}; the same command goes on from the checkpoint before")
