"""What a check says, and how checks are run: all at once, each within a time, none with a traceback."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from configs.schema import ConfigError
from data.errors import DataError

T = TypeVar("T")
State = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    text: str
    """What was found and, unless all is well, what was expected."""
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at."""

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float
    """After which it counts as failed, and nobody waits for it."""


class Once(Generic[T]):
    """A value that several checks need, made by the first that asks. An error is raised to each of them."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self.made: T | None = None
        """None: nobody has asked yet, or it could not be made."""
        self._error: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self.made is None:
                try:
                    self.made = self._make()
                except Exception as error:
                    self._error = error
                    raise
            return self.made


def examine(checks: Sequence[Check]) -> list[Finding]:
    """Findings of all checks, in their order. Takes as long as the longest check, at most its `seconds`.

    Checks run in threads that nobody waits for at the end: one that hangs in a dead file system holds up nothing.
    """
    began = time.monotonic()
    answers: list[queue.SimpleQueue[list[Finding]]] = []
    for check in checks:
        answer: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()
        answers.append(answer)
        threading.Thread(target=lambda c=check, a=answer: a.put(_looked(c)), daemon=True).start()
    findings: list[Finding] = []
    for check, answer in zip(checks, answers, strict=True):
        try:
            findings += answer.get(timeout=max(0.0, began + check.seconds - time.monotonic()))
        except queue.Empty:
            text = f"expected an answer within {check.seconds:g} s, got none"
            cure = "look whether a file system, name server or driver hangs; a set without an index takes a scan"
            findings.append(Finding(check.name, "fail", text, cure))
    return findings


def _looked(check: Check) -> list[Finding]:
    try:
        return list(check.look())
    except (ConfigError, DataError) as error:  # which say what to do
        return [Finding(check.name, "fail", str(error))]
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [Finding(check.name, "fail", f"{where}{error.strerror or error}")]
    except Exception as error:
        words = (str(error) or "no message").splitlines()[0]
        cure = "the check itself failed: tell us"
        return [Finding(check.name, "fail", f"{type(error).__name__}: {words}", cure)]


def size_text(count: float) -> str:
    """Bytes, as people read them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
