"""The checkpoints of one run: which there are, which counts, and which are kept.

latest                      a line: the folder a run goes on from
best                        a line: the folder with the highest score
step_000001200/             manifest.json, and a part for each rank
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace

from training.checkpoint.errors import CheckpointError, DamagedError
from training.checkpoint.manifest import NAME, Manifest
from training.checkpoint.places import Place
from training.checkpoint.saved import Saved

LATEST, BEST = "latest", "best"
_STEP = re.compile(r"step_\d{9,}")
_PART = re.compile(r"rank_\d{5}-[0-9a-f]+\.safetensors|\.manifest\.json\.new")


def folder_of(step: int) -> str:
    return f"step_{step:09d}"


def part_of(rank: int, token: str) -> str:
    """Name of a rank's part. token: of one save, so that another of the same step never writes into it."""
    return f"rank_{rank:05d}-{token}.safetensors"


class Checkpoints:
    """No method runs a collective. All may raise OSError."""

    def __init__(self, place: Place, *, keep: int, keep_best: int) -> None:
        """keep: checkpoints that were written last, keep_best: those with the highest scores beside them."""
        self.place, self._keep, self._keep_best = place, keep, keep_best

    def folders(self) -> list[str]:
        return sorted(name for name in self.place.folders() if _STEP.fullmatch(name))

    def pointer(self, name: str) -> str:
        """What `latest` or `best` says; nothing where it is not there or not text."""
        try:
            return self.place.read(name, 0, 1000).decode().strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def newest_first(self, say: list[str]) -> Iterator[Saved]:
        """Those that are whole as far as names and sizes tell: first the one that `latest` names, then by time.

        say: takes a line for each that is not, as it is met.
        """
        latest, seen = self.pointer(LATEST), set[str]()
        if latest and latest in self.folders():
            with _telling(say):
                seen.add(latest)
                yield Saved(self.place, latest)
        elif latest:
            say.append(f"{self.place.address}/{LATEST}: names {latest[:80]!r}, which is not a checkpoint beside it")
        others = []
        for folder in self.folders():
            if folder not in seen and self._is_finished(folder):
                with _telling(say):
                    others.append(Saved(self.place, folder))
        yield from sorted(others, key=lambda saved: (saved.manifest.saved, saved.manifest.step), reverse=True)

    def _is_finished(self, folder: str) -> bool:
        """Whether it ever counted; one without a manifest was left by a run that died while writing it."""
        return NAME in self.place.files(folder)

    def publish(self, folder: str, manifest: Manifest) -> None:
        """Let a checkpoint count whose parts are all there; then remove what is no longer kept."""
        there = self.place.files(folder)
        if missing := sorted(manifest.parts.keys() - set(there)):
            raise CheckpointError(
                f"{self.place.address}/{folder}: expected the part of every rank, {missing[0]} is missing: put "
                "train.checkpoints (or train.output) on a file system that all hosts share"
            )
        self.place.put(f"{folder}/{NAME}", manifest.to_bytes())
        self.place.put(LATEST, f"{folder}\n".encode())
        for name in there:  # of another save of the same step, by a run that was started over
            if name not in manifest.parts and _PART.fullmatch(name):
                self.place.remove(f"{folder}/{name}")
        self._prune(folder)

    def rate(self, folder: str, score: float | None) -> None:
        """Give a checkpoint the score of the evaluation after its step; none counts as evaluated too."""
        manifest = Saved(self.place, folder).manifest
        rated = replace(manifest, score=score, evaluated=True)
        self.place.put(f"{folder}/{NAME}", rated.to_bytes())
        self._prune(folder)

    def _prune(self, newest: str) -> None:
        found: dict[str, Manifest] = {}
        for folder in self.folders():
            files = self.place.files(folder)
            if NAME in files:
                with contextlib.suppress(DamagedError):  # kept: its owner may have a copy of what is damaged
                    found[folder] = Saved(self.place, folder).manifest
            elif folder != newest and files and all(_PART.fullmatch(name) for name in files):
                self.place.remove(folder)
        # By time, not by step: a run that was started over, or went on from an older step, counts from less again.
        by_time = sorted(found, key=lambda name: (name == newest, found[name].saved), reverse=True)
        scores = {name: manifest.score for name, manifest in found.items() if manifest.score is not None}
        by_score = sorted(scores, key=lambda name: (scores[name], found[name].saved), reverse=True)
        if by_score and self.pointer(BEST) != by_score[0]:
            self.place.put(BEST, f"{by_score[0]}\n".encode())
        for folder in found.keys() - set(by_time[: self._keep]) - set(by_score[: self._keep_best]):
            self.place.remove(f"{folder}/{NAME}")  # first: what is left of it must not count
            self.place.remove(folder)


@contextlib.contextmanager
def _telling(say: list[str]) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        say.append(str(error))
