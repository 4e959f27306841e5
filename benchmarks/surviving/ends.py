"""Faults that end processes, or spoil a checkpoint while none is there, in cycles: each a training to its end.

After every one it must go on from the checkpoint that the fault has left; at the end all bits are those of a training
that nothing happened to.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.surviving.group import Fault
from benchmarks.surviving.runs import RANKS, STEPS_PER_EPOCH, Recipe, Run, compare
from training.checkpoint.folder import LATEST, folder_of

_STRETCH, _EVERY, _KEPT = 32, 4, 3
"""Steps in which one fault falls, between checkpoints, and checkpoints kept: enough new ones before the next fault."""
_FIRST, _LAST = 12, 28
"""Steps of a stretch between which it falls."""
_TIMEOUT, _WORD_S, _GONE_S = 10, 10.0, 30.0
"""train.timeout; seconds after it by which a hang must have been said; within which ranks follow their launcher."""
_WARNING = "WARNING training.checkpointing"


class _Faults:
    """Each does its harm and returns the step from which the training must go on, and the moment it was done."""

    def __init__(self, run: Run, draw: random.Random) -> None:
        self._run, self._draw = run, draw
        self._spoilt: set[str] = set()
        self.kinds: dict[str, Callable[[], tuple[int, float]]] = {
            "SIGKILL of a rank": self._kill,
            "SIGKILL of a rank, and of one that starts": self._kill_twice,
            "SIGTERM to torchrun": self._stop_and_start,
            "SIGKILL of torchrun": self._kill_launcher_and_start,
            "SIGUSR1 to a rank": self._ask,
            "SIGSTOP of a rank, for good": self._freeze,
            "a byte of the newest checkpoint changed": lambda: self._spoil(self._flip),
            "a file of the newest checkpoint cut": lambda: self._spoil(self._cut),
            "a file of the newest checkpoint removed": lambda: self._spoil(Path.unlink),
            "`latest` removed": lambda: self._without_latest(None),
            "`latest` holds rubbish": lambda: self._without_latest(b"step_9\xff\n"),
            "`latest` names what is not there": lambda: self._without_latest(b"step_999999999\n"),
        }

    # ---- processes ---------------------------------------------------------------------------------------------

    def _kill(self) -> tuple[int, float]:
        ranks, begin = self._run.ranks(), time.monotonic()
        os.kill(ranks[self._draw.randrange(RANKS)], signal.SIGKILL)
        self._run.until_gone(set(ranks.values()), 60)
        return self._run.latest, begin

    def _kill_twice(self) -> tuple[int, float]:
        latest, _ = self._kill()
        self._run.wait(lambda: len(self._run.launch.ranks()) == RANKS, 60, "the next ranks")
        time.sleep(self._draw.uniform(0, 6))
        ranks, begin = self._run.ranks(), time.monotonic()
        os.kill(ranks[self._draw.randrange(RANKS)], signal.SIGKILL)
        self._run.until_gone(set(ranks.values()), 60)
        return max(latest, self._run.latest), begin

    def _stop(self) -> int:
        """An orderly end: steps of the checkpoint that it leaves."""
        begin = time.monotonic()
        self._run.launch.process.terminate()
        self._run.until_gone(set(self._run.launch.alive()), 60)
        return self._stopped("SIGTERM", begin)

    def _stopped(self, by: str, begin: float) -> int:
        told = self._run.said(begin, f"stopped by {by} after ")
        found = re.search(r"after (\d+) of", told[0]) if told else None
        if found is None or int(found[1]) != self._run.latest:
            raise self._run.unexpected(f"it should have stopped with a checkpoint; the newest is {self._run.latest}")
        return int(found[1])

    def _stop_and_start(self) -> tuple[int, float]:
        begin, step = time.monotonic(), self._stop()
        self._run.start()
        return step, begin

    def _kill_launcher(self) -> int:
        begin = time.monotonic()
        self._run.launch.process.kill()
        self._run.until_gone(set(self._run.launch.alive()), _GONE_S)
        return self._stopped("SIGTERM", begin)

    def _kill_launcher_and_start(self) -> tuple[int, float]:
        begin, step = time.monotonic(), self._kill_launcher()
        self._run.start()
        return step, begin

    def _ask(self) -> tuple[int, float]:
        ranks, begin = self._run.ranks(), time.monotonic()
        os.kill(ranks[self._draw.randrange(RANKS)], signal.SIGUSR1)
        self._run.until_gone(set(ranks.values()), 60)
        return self._stopped("SIGUSR1", begin), begin

    def _freeze(self) -> tuple[int, float]:
        """Torchrun kills the rank that stands still half a minute after the other has said what is wrong."""
        ranks, begin = self._run.ranks(), time.monotonic()
        rank = self._draw.randrange(RANKS)
        os.kill(ranks[rank], signal.SIGSTOP)
        self._run.wait(lambda: bool(self._run.said(begin, "error: ")), _TIMEOUT + _WORD_S, "a line that says who hangs")
        if not self._run.said(begin, f"error: rank {rank} "):
            raise self._run.unexpected(f"rank {rank} stood still, another was named")
        self._run.until_gone(set(ranks.values()), 90)
        return self._run.latest, begin

    # ---- files -------------------------------------------------------------------------------------------------

    def _down(self) -> int:
        return self._draw.choice([self._stop, self._kill_launcher])()

    def _spoil(self, harm: Callable[[Path], object]) -> tuple[int, float]:
        """The checkpoint before it is taken, and the log names the one that is damaged."""
        step = self._down()
        left = [one for one in self._run.whole() if one != step]
        if not left:
            raise self._run.unexpected(f"there is no checkpoint but that of step {step}")
        file = self._draw.choice(sorted((self._run.checkpoints / folder_of(step)).iterdir()))
        harm(file)
        self._spoilt.add(folder_of(step))
        return self._again(left[0], folder_of(step))

    def _flip(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[self._draw.randrange(len(content))] ^= 1
        file.write_bytes(content)

    def _cut(self, file: Path) -> None:
        os.truncate(file, self._draw.randrange(file.stat().st_size - 1))  # the last byte may be an end of line

    def _without_latest(self, content: bytes | None) -> tuple[int, float]:
        step = self._down()
        latest = self._run.checkpoints / LATEST
        if content is None:
            latest.unlink()
        else:
            latest.write_bytes(content)
        is_text = content is not None and content.isascii()
        return self._again(step, f"{LATEST}: names" if is_text else "")

    def _again(self, step: int, said: str) -> tuple[int, float]:
        known, begin = len(self._run.events), time.monotonic()
        self._run.start()
        self._run.recovery(known)
        told = self._run.said(begin, _WARNING)
        # Those that were damaged earlier are kept, and told of again whenever all are looked at.
        new = [line for line in told if not any(folder in line for folder in self._spoilt if folder != said)]
        if bool(said) != bool(new) or not all(said in line for line in new):
            raise self._run.unexpected(f"expected a warning about {said!r}, got {told}")
        return step, begin


def recipe(data: Path) -> Recipe:
    """The training of a cycle, in which each kind of fault comes once."""
    more = (
        *("clustering.warmup_fraction=0.1", "clustering.ramp_fraction=0.1", f"train.timeout={_TIMEOUT}"),
        *("eval.sets=[verification.bin]", "eval.every_epochs=10", f"train.keep_checkpoints={_KEPT}"),
    )
    return Recipe(data=data, epochs=13 * _STRETCH // STEPS_PER_EPOCH, checkpoint_steps=_EVERY, more=more)


def cycle(
    recipe: Recipe, output: Path, whole: Path, until: float, draw: random.Random, tell: Callable[[str], None]
) -> list[Fault]:
    """One training with faults, of which none comes after the moment `until`. Raises UnexpectedError."""
    found: list[Fault] = []
    with Run(recipe, output, restarts=100) as run:
        faults = _Faults(run, draw)
        for number, kind in enumerate(draw.sample(list(faults.kinds), len(faults.kinds))):
            run.until_step(number * _STRETCH + draw.randint(_FIRST, _LAST))
            if time.monotonic() > until:
                break
            time.sleep(draw.random() * run.step_seconds)
            run.look()
            at, known = run.step, len(run.events)
            step, begin = faults.kinds[kind]()
            recovery = run.recovery(known)
            if recovery.resumed != step:
                raise run.unexpected(f"{kind}: it went on from step {recovery.resumed}, expected {step}")
            found.append(Fault(kind, begin, recovery.next_step - begin, recovery.twice))
            tell(
                f"{kind}, at step {at}: went on from step {recovery.resumed}, {recovery.twice} steps again, next step "
                f"after {found[-1].seconds:.1f} s"
            )
        run.until_end(900)
        twice, counted = run.twice(), sum(fault.twice for fault in found)
        if twice != counted:
            raise run.unexpected(f"{twice} steps were done twice, {counted} by the starts")
    same = compare(whole, output, recipe.steps)
    tell(f"cycle done: {len(found)} faults, {twice} steps done twice, {same} tensors the same bit for bit")
    return found
