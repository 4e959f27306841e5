"""Trainings on two CPU ranks under torchrun that are disturbed: how far they are, and what they are at their end.

They show every step, so that a fault can be set between two of them. Moments are those of time.monotonic().
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.__main__ import main as data
from tests.launches import Launch
from training.checkpoint import DamagedError, Saved, place_of
from training.checkpoint.folder import folder_of
from training.checkpoint.manifest import NAME

RANKS, BATCH, IDENTITIES, IMAGES = 2, 12, 24, 8
STEPS_PER_EPOCH = IDENTITIES * IMAGES // (RANKS * BATCH)
_ROOT = Path(__file__).parents[2]
_SETTINGS = (
    *("model.backbone=small", "model.embedding_size=16", "head.scale=16", "head.margin=0.3"),
    *("clustering.margin_low=0.15", "clustering.margin_high=0.45", "clustering.block=16"),
    *("optim.lr=0.02", "optim.reference_batch=0", "data.threads=1", "data.backend=cpu"),
    *("train.device=cpu", "train.precision=fp32", "train.cpu_threads=1", "train.log_steps=1"),
    f"train.batch_size={BATCH}",
)
_POLL_S = 0.002
_START_S, _STEP_S = 240.0, 120.0
"""Longest waits for a start, and for a step: other jobs may use the cores as well."""
_STEP = re.compile(r"step (\d+)/\d+  loss")
_START = re.compile(r"steps an epoch, \d+ in all(?:; resumed at step (\d+))?$")


class UnexpectedError(Exception):
    """A training did not do what it should; the message says what, and holds the last lines that it said."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training."""

    data: Path
    epochs: int
    checkpoint_steps: int
    more: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.epochs * STEPS_PER_EPOCH

    def command(self, output: Path, restarts: int) -> list[str]:
        """Arguments of Python. restarts: how often torchrun may start the ranks anew."""
        settings = (*_SETTINGS, *self.more, f"train.epochs={self.epochs}", f"data.path={self.data}",
                    f"train.checkpoint_steps={self.checkpoint_steps}", f"train.output={output}")  # fmt: skip
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}",
                    f"--max-restarts={restarts}")  # fmt: skip
        return [*launcher, "train_dist.py", *(part for setting in settings for part in ("--set", setting))]


def pack(folder: Path) -> Path:
    """A small set of drawn faces, and pairs to verify: where it is."""
    size = ("--identities", str(IDENTITIES), "--images-per-identity", str(IMAGES))
    pairs = ("--verification-identities", "8", "--pairs", "40")
    out = folder / "set"
    if not out.is_dir():
        data(["pack", "synthetic", "--out", str(out), "--workers", "1", "--seed", "3", *size, *pairs])
    return out


class Event(NamedTuple):
    """A training began, having done so many steps; or it has done one more."""

    moment: float
    is_start: bool
    step: int


class Recovery(NamedTuple):
    """What a fault cost."""

    resumed: int
    """Steps of the checkpoint from which it went on."""
    twice: int
    """Steps that were done again."""
    next_step: float
    """Moment at which the first step after it was done."""


class Run:
    """A training that may be started again after its end; a context manager, which leaves no process behind.

    All that it has said is at its end beside its output, in a file with the ending .log.
    """

    def __init__(self, recipe: Recipe, output: Path, *, restarts: int, checkpoints: Path | None = None) -> None:
        self.recipe, self.output, self._restarts = recipe, output, restarts
        self.checkpoints = checkpoints or output / "checkpoints"
        self.events: list[Event] = []
        self._launch: Launch | None = None
        self._read = 0
        self._said: list[tuple[float, str]] = []

    def __enter__(self) -> Run:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start(self) -> None:
        """Start it; what is left of the last start is ended before."""
        self._end()
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = self.recipe.command(self.output, self._restarts)
        self._launch, self._read = Launch(command, cwd=_ROOT, environment=environment), 0

    def _end(self) -> None:
        if self._launch is not None:
            self._launch.__exit__(None, None, None)
            self.look()
            self._launch = None
            told = "".join(f"{moment:.3f} {line}\n" for moment, line in self._said)
            self.output.with_name(f"{self.output.name}.log").write_text(told, encoding="utf-8")

    @property
    def launch(self) -> Launch:
        """The newest start."""
        if self._launch is None:
            raise UnexpectedError("it is not started")
        return self._launch

    def look(self) -> None:
        """Take up what it has said meanwhile."""
        lines = self.launch.lines
        for moment, line in lines[self._read :]:
            self._read += 1
            self._said.append((moment, line))
            if found := _STEP.match(line):
                self.events.append(Event(moment, False, int(found[1])))
            elif found := _START.search(line):
                self.events.append(Event(moment, True, int(found[1] or 0)))

    @property
    def step(self) -> int:
        """Steps that it has done, as it last said; -1 before it has begun."""
        return self.events[-1].step if self.events else -1

    @property
    def has_stepped(self) -> bool:
        """Whether it has done a step since its start."""
        return bool(self.events) and not self.events[-1].is_start

    @property
    def step_seconds(self) -> float:
        """A step's time, of the last ones."""
        ends = [event.moment for event in self.events[-9:]]
        return statistics.median([b - a for a, b in itertools.pairwise(ends)] or [0.1])

    def said(self, since: float, text: str) -> list[str]:
        """Lines since a moment that hold a text."""
        self.look()
        return [line for moment, line in self._said if moment >= since and text in line]

    def wait(self, done: Callable[[], bool], within: float, what: str, *, may_end: bool = False) -> float:
        """Wait until it is so; the moment. Raises UnexpectedError when that takes too long, or it ended before."""
        deadline = time.monotonic() + within
        while True:
            ended = self.launch.process.poll() is not None
            self.look()
            if done():
                return time.monotonic()
            if ended and not may_end:
                raise self.unexpected(f"it ended, exit code {self.launch.process.returncode}, before {what}")
            if time.monotonic() > deadline:
                raise self.unexpected(f"waited {within:g} s for {what}")
            time.sleep(_POLL_S)

    def unexpected(self, what: str) -> UnexpectedError:
        """What to raise, with the last lines that it said."""
        self.look()
        lines = [line[:400] for _, line in self._said if line.strip()][-40:]
        return UnexpectedError("\n".join([f"{what}. The last lines:", *lines]))

    def until_step(self, step: int) -> None:
        """Wait until it has done so many steps."""
        within = _START_S + _STEP_S + max(0, step - self.step) * 5
        self.wait(lambda: self.has_stepped and self.step >= step, within, f"step {step}")

    def ranks(self) -> dict[int, int]:
        """The process of each rank. Takes some milliseconds."""
        found = self.launch.ranks()
        if sorted(found) != list(range(RANKS)):
            raise self.unexpected(f"expected {RANKS} ranks, found {found}")
        return found

    def until_gone(self, pids: set[int], within: float) -> float:
        """Wait until these processes are no more; the moment."""
        return self.wait(lambda: not pids & set(self.launch.alive()), within, f"the end of {pids}", may_end=True)

    def recovery(self, known: int) -> Recovery:
        """Wait for the first step after a start. known: `len(events)` at the fault; there must be one start since."""
        self.wait(lambda: any(event.is_start for event in self.events[known:]), _START_S, "the next start")
        at = next(number for number, event in enumerate(self.events) if number >= known and event.is_start)
        self.wait(lambda: len(self.events) > at + 1, _STEP_S, "the next step")
        before, start, after = self.events[at - 1], self.events[at], self.events[at + 1]
        if after.step != start.step + 1:
            raise self.unexpected(f"expected step {start.step + 1} after its start, got {after.step}")
        if start.step > before.step:
            raise self.unexpected(f"it went on from step {start.step}, but had only come to {before.step}")
        return Recovery(start.step, before.step - start.step, after.moment)

    @property
    def latest(self) -> int:
        """Steps of the checkpoint that counts; -1 where there is none."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.checkpoints / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))
        return -1

    def files_of(self, step: int) -> set[str]:
        """Files of a checkpoint, written in part or whole."""
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(self.checkpoints / folder_of(step))}
        return set()

    def whole(self) -> list[int]:
        """Steps of the checkpoints that are whole by names and sizes, the newest first."""
        found: list[tuple[float, int]] = []
        place = place_of(str(self.checkpoints))
        for folder in place.folders():
            if NAME in place.files(folder):
                with contextlib.suppress(DamagedError):
                    manifest = Saved(place, folder).manifest
                    found.append((manifest.saved, manifest.step))
        return [step for _, step in sorted(found, reverse=True)]

    def twice(self) -> int:
        """Steps that were done more than once, each time counted."""
        return sum(not event.is_start for event in self.events) - self.recipe.steps

    def until_end(self, seconds: float) -> None:
        """Wait for its good end. Raises UnexpectedError when that is another one, or processes are left."""
        self.wait(lambda: self.launch.process.poll() is not None, seconds, "its end", may_end=True)
        if code := self.launch.process.returncode:
            raise self.unexpected(f"it ended with exit code {code}")
        if left := self.launch.alive():
            raise self.unexpected(f"it ended, but left processes {left}")
        if not (self.output / "backbone.pt").is_file():
            raise self.unexpected("it ended without backbone.pt")


def undisturbed(recipe: Recipe, output: Path) -> float:
    """The same training, left alone: seconds."""
    begin = time.monotonic()
    with Run(recipe, output, restarts=0) as run:
        run.until_end(_START_S + recipe.steps * 5)
    return time.monotonic() - begin


def compare(expected: Path, got: Path, steps: int) -> int:
    """How many tensors two runs ended with, the same bit for bit, and the same counts. Raises UnexpectedError."""
    first, second = (dict(_weights(folder)) for folder in (expected, got))
    saved = [Saved(place_of(str(folder / "checkpoints")), folder_of(steps)) for folder in (expected, got)]
    for one, into in zip(saved, (first, second), strict=True):
        into |= {name: one.read(name) for name in one.names}
    if first.keys() != second.keys():
        raise UnexpectedError(f"tensors of one run alone: {sorted(first.keys() ^ second.keys())}")
    if differ := [name for name in first if not _same(first[name], second[name])]:
        raise UnexpectedError(
            f"{len(differ)} of {len(first)} tensors differ from those of the undisturbed run: {differ}"
        )
    for part in ("state", "run"):
        values: list[Any] = [one.values[part] for one in saved]
        if values[0] != values[1]:
            raise UnexpectedError(f"{part} differs: {values[0]} undisturbed, {values[1]} disturbed")
    return len(first)


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in torch.load(folder / "backbone.pt", weights_only=True).items():
        yield f"backbone.pt {name}", tensor


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
