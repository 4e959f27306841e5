"""The checkpoints of one run: which there are, which counts, and which are kept.

latest                      a line: the folder a run goes on from; `none` while a run that was started over has none
best                        a line: the folder with the highest score
owner                       a line: who writes here, so that of two runs in one folder the older one stops
step_000001200/             manifest.json, and a part for each rank
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace

from training.checkpoint.errors import CheckpointError, DamagedError
from training.checkpoint.manifest import MOST_BYTES, NAME, Manifest, parse
from training.checkpoint.places import Place
from training.checkpoint.saved import Saved

LATEST, BEST, OWNER = "latest", "best", "owner"
NONE = "none"
_STEP = re.compile(r"step_\d{9,}")
_PART = re.compile(r"rank_\d{5}-[0-9a-f]+\.safetensors|\.manifest\.json\.new")
_log = logging.getLogger(__name__)


def folder_of(step: int) -> str:
    return f"step_{step:09d}"


def part_of(rank: int, token: str) -> str:
    """Name of a rank's part. token: of one save, so that another of the same step never writes into it."""
    return f"rank_{rank:05d}-{token}.safetensors"


class Checkpoints:
    """No method runs a collective. All may raise OSError."""

    def __init__(self, place: Place, *, keep: int, keep_best: int) -> None:
        """keep: checkpoints that were written last, keep_best: those of a run with the highest scores beside them."""
        self.place, self._keep, self._keep_best = place, keep, keep_best

    def folders(self) -> list[str]:
        """By step, finished or not."""
        return sorted(name for name in self.place.folders() if _STEP.fullmatch(name))

    def finished(self) -> list[str]:
        """Those that have counted; one without a manifest is being written, or was left by a run that died then."""
        return [name for name in self.folders() if NAME in self.place.files(name)]

    def pointer(self, name: str) -> str:
        """What `latest`, `best` or `owner` says; nothing where it is not there or not text."""
        try:
            return self.place.read(name, 0, 1000).decode().strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def claim(self, token: str, *, over: bool) -> None:
        """Become the one that writes here. over: a run starts over; until its first checkpoint it goes on from none."""
        self.place.put(OWNER, f"{token}\n".encode())
        if over and self.folders():
            self.place.put(LATEST, f"{NONE}\n".encode())

    def newest_first(self, say: list[str]) -> Iterator[Saved]:
        """Those that are whole as far as names and sizes tell: first the one that `latest` names, then by time.

        After the one that `latest` names come those of the same run alone. say: takes a line for each that is not
        whole, as it is met. Raises CheckpointError for one that cannot be read.
        """
        latest, finished, run = self.pointer(LATEST), self.finished(), ""
        if latest == NONE:
            return
        if latest in finished:
            with _telling(say):
                saved = Saved(self.place, latest)
                run = saved.manifest.run
                yield saved
        elif latest:
            say.append(f"{self.place.address}/{LATEST}: names {latest[:80]!r}, which is not a checkpoint beside it")
        others = []
        for folder in finished:
            if folder != latest:
                with _telling(say):
                    others.append(Saved(self.place, folder))
        others.sort(key=lambda saved: (saved.manifest.saved, saved.manifest.step), reverse=True)
        yield from (saved for saved in others if run in ("", saved.manifest.run))

    def publish(self, folder: str, manifest: Manifest, token: str) -> None:
        """Let a checkpoint count whose parts are all there. token: of who claimed the place."""
        if self.pointer(OWNER) not in ("", token):
            raise CheckpointError(
                f"{self.place.address}: another run has begun to write here: end one of the two, or give each a "
                "train.output of its own"
            )
        if missing := sorted(manifest.parts.keys() - self.place.files(folder).keys()):
            raise CheckpointError(
                f"{self.place.address}/{folder}: expected the part of every rank, {missing[0]} is missing: put it on a "
                "file system that all hosts share"
            )
        self.place.put(f"{folder}/{NAME}", manifest.to_bytes())
        self.place.put(LATEST, f"{folder}\n".encode())

    def rate(self, folder: str, score: float | None) -> None:
        """Give a checkpoint the score of the evaluation after its step; none counts as evaluated too."""
        rated = replace(self._manifest(folder), score=score, evaluated=True)
        self.place.put(f"{folder}/{NAME}", rated.to_bytes())

    def tidy(self, newest: str) -> None:
        """Remove what is no longer kept, and name the best. newest: never removed. Says what it cannot do."""
        try:
            self._tidy(newest)
        except OSError as error:
            _log.warning("%s: cannot remove older checkpoints (%s)", self.place.address, error.strerror or error)

    def _manifest(self, folder: str) -> Manifest:
        name = f"{folder}/{NAME}"
        return parse(f"{self.place.address}/{name}", self.place.read(name, 0, MOST_BYTES + 1))

    def _tidy(self, newest: str) -> None:
        found: dict[str, Manifest] = {}
        for folder in self.folders():
            files = self.place.files(folder)
            if NAME in files:
                with contextlib.suppress(DamagedError):  # kept: its owner may have a copy of what is damaged
                    found[folder] = self._manifest(folder)
            elif folder != newest and all(_PART.fullmatch(name) for name in files):
                self.place.remove(folder)
        if newest not in found:
            return
        for name in self.place.files(newest):  # of another save of the same step, by a run that was started over
            if name not in found[newest].parts and _PART.fullmatch(name):
                self.place.remove(f"{newest}/{name}")
        # By time, not by step: a run that was started over, or went on from an older step, counts from less again.
        by_time = sorted(found, key=lambda name: (name == newest, found[name].saved), reverse=True)
        scores = {
            name: manifest.score
            for name, manifest in found.items()
            if manifest.score is not None and manifest.run == found[newest].run
        }
        by_score = sorted(scores, key=lambda name: (scores[name], found[name].saved), reverse=True)
        keep = {*by_time[: self._keep], *by_score[: self._keep_best]}
        for folder in found.keys() - keep:
            self.place.remove(f"{folder}/{NAME}")  # first: what is left of it must not count
            self.place.remove(folder)
        best = next((name for name in by_score if name in keep), "")
        if best and self.pointer(BEST) != best:
            self.place.put(BEST, f"{best}\n".encode())


@contextlib.contextmanager
def _telling(say: list[str]) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        say.append(str(error))
