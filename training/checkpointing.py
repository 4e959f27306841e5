"""The checkpoints of a run: written beside it, told about, gone on from."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

from configs.schema import TrainConfig
from partial_fc.collectives import extremes
from training.checkpoint import CheckpointError, Checkpoints, DamagedError, Saved, Saver, Written, place_of
from training.checkpoint.folder import folder_of
from training.checkpoint.same_run import refuse_another_run
from training.distributed import Ranks
from training.metrics import RunLog
from training.run_state import RunState

_log = logging.getLogger(__name__)

_MOST_FAILURES = 2
"""Saves that fail in a row before the training ends: one may be a file system's bad minute."""


class RunCheckpoints:
    """All ranks make one and call it alike."""

    def __init__(self, config: TrainConfig, ranks: Ranks, state: RunState, settings: dict[str, dict[str, Any]]) -> None:
        """settings: with the facts that must agree, see `refuse_another_run`. One all-reduce."""
        self._ranks, self._state, self._settings = ranks, state, settings
        place = place_of(config.checkpoints or os.path.join(config.output, "checkpoints"))
        self.folder = Checkpoints(place, keep=config.keep_checkpoints, keep_best=config.keep_best)
        _, newest = extremes(int.from_bytes(os.urandom(6), "big"), ranks.group, ranks.device)
        self._saver = Saver(self.folder, ranks, f"{newest:012x}")
        self._saved, self._failures = -1, 0
        self._latest: Written | None = None
        self._fault = ""
        self._counts = False

    def resume(self) -> Saved | None:
        """Become what the newest whole checkpoint holds; None where there is none at all.

        Says of each that is damaged that it is left out. Raises CheckpointError, on all ranks: when it is of another
        run, when ranks see different ones, or when there are some and none is whole. Two all-reduces for each.
        """
        lines: list[str] = []
        try:
            candidates = self.folder.newest_first(lines)
            while True:
                saved = next(candidates, None)
                self._say(lines)
                self._check_same(saved)
                if saved is None:
                    break
                error = self._restored(saved)
                if not extremes(int(bool(error)), self._ranks.group, self._ranks.device)[1]:
                    self._saved, self._counts = saved.manifest.step, True
                    return saved
                self._say([f"{error or 'another rank found it damaged'}: going on from an older checkpoint"])
            there = self.folder.folders() if self.folder.pointer("latest") else []
        except OSError as error:
            raise CheckpointError(f"{self.folder.place.address}: cannot read it ({error.strerror or error})") from None
        if there:
            raise CheckpointError(
                f"{self.folder.place.address}: none of its {len(there)} checkpoints is whole, see above: bring one "
                "back, choose another train.output, or start over with --set train.resume=false"
            )
        return None

    def _restored(self, saved: Saved) -> str:
        """Restore it here: what is damaged."""
        try:
            refuse_another_run(saved.address, saved.values["settings"], self._settings)
            self._state.restore(saved)
        except DamagedError as error:
            return str(error)
        except KeyError as error:
            raise CheckpointError(f"{saved.address}: not a checkpoint of this program, {error} is not in it") from None
        return ""

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            if self._ranks.first_to_say(line):
                _log.warning("%s", line)
        lines.clear()

    def _check_same(self, saved: Saved | None) -> None:
        """Ranks that went on from different steps would run different collectives and wait for each other for ever."""
        step, mark = -1, 0
        if saved is not None:
            step = saved.manifest.step
            mark = int.from_bytes(hashlib.sha256(saved.manifest.to_bytes()).digest()[:6], "big")
        oldest, newest = extremes(step, self._ranks.group, self._ranks.device)
        low, high = extremes(mark, self._ranks.group, self._ranks.device)
        if newest != oldest or low != high:
            said = "no checkpoint" if oldest < 0 else f"step {oldest}"
            raise CheckpointError(
                f"ranks see different checkpoints ({said} and step {newest}): expected train.output on a file system "
                "that all hosts share"
            )

    def save(self, step: int, values: Callable[[], dict[str, Any]], log: RunLog, *, last: bool = False) -> None:
        """Begin to save the state after `step` steps, unless it is saved; `last`: wait until it counts. No collective.

        values: counts of the run that belong to it, as JSON has them. Raises CheckpointError, on all ranks, when saves
        fail: the last, or `_MOST_FAILURES` in a row.
        """
        self._heard(self._saver.finish(), log)  # ranks may have heard of it at different times: now all have
        self._refuse(_MOST_FAILURES)
        if step != self._saved:
            tensors, state = self._state.collect()
            held = {"settings": self._settings, "state": state, "run": values()}
            self._saver.save(step, tensors, held)
            self._saved = step
        if last:
            self._heard(self._saver.finish(), log)
            self._refuse(1)

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
            "checkpoint/seconds_blocked": written.blocked,
            "checkpoint/seconds": written.seconds,
            "checkpoint/gigabytes_per_rank": written.nbytes / 1e9,
        }

    def rate(self, step: int, score: float | None, log: RunLog) -> None:
        """Give the checkpoint of this step its score, if there is one that counts; rank 0's. Waits for it."""
        if step != self._saved:
            return
        self._heard(self._saver.finish(), log)
        if self._ranks.is_main and not self._failures:
            log.attempt("checkpoints", lambda: self.folder.rate(folder_of(step), score))

    def _heard(self, written: Written | None, log: RunLog) -> None:
        if written is None:
            return
        if not written.error:
            self._failures, self._counts, self._latest = 0, True, written
            return
        self._failures += 1
        self._saved = -1
        self._fault = (
            f"cannot write the checkpoint of step {written.step} ({written.error}): make room or mend the folder"
        )
        if self._failures < _MOST_FAILURES:
            log.say(f"{self._fault}; training goes on, and the next one is tried")

    def _refuse(self, failures: int) -> None:
        if self._failures >= failures:
            raise CheckpointError(f"{self._fault}; the same command goes on from the checkpoint before")
