"""A thread between the training and a network: the one never waits for the other."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from configs.schema import RunConfig
from data.contact_sheet import Pixels
from training.sinks.base import Sink, said

ROOM = 1000
"""Reports that wait at most."""
ROOM_FOR_PICTURES = 50
"""Reports behind which a picture still waits: it has some megabytes."""
FLUSH_S = 10.0
"""What a run waits at its end for its last reports to be taken."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""After each try of a report that fails. The beginning of a run there is tried until it is taken."""


class Queued:
    """A sink that is told in order, by a daemon thread, from a queue of bounded length.

    What does not fit, or fails seven times, is lost and counted. That something fails is said once, and so is that it
    no longer does. Nothing here raises, and only `close` waits, for FLUSH_S at most.
    """

    def __init__(self, sink: Sink, say: Callable[[str], None]) -> None:
        self.name, self._sink, self._say = sink.name, sink, say
        self._calls = queue.SimpleQueue[Callable[[], None] | None]()
        self._failing, self._dropped, self._refused = False, 0, 0
        self._closing, self._ending, self._failed = threading.Lock(), threading.Event(), False
        self._thread: threading.Thread | None = None

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        def begin() -> None:
            self._say(f"{self.name}: {self._sink.start(config, output, resumed=resumed)}")

        self._thread = threading.Thread(target=self._work, args=[begin], name=self.name, daemon=True)
        self._thread.start()
        return ""

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        self._put(lambda: self._sink.scalars(step, values, when), ROOM)

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        self._put(lambda: self._sink.picture(step, tag, picture), ROOM_FOR_PICTURES)

    def close(self, *, failed: bool) -> None:
        """Tell what is left, in FLUSH_S at most. A second call does nothing, while the first still waits too."""
        if self._thread is None or not self._closing.acquire(blocking=False):
            return
        self._failed = failed
        self._calls.put(None)
        self._ending.set()
        self._thread.join(FLUSH_S)
        lost = self._dropped + self._refused
        if self._thread.is_alive():
            lost += max(0, self._calls.qsize() - 1)
            self._say(f"{self.name}: did not take the last reports within {FLUSH_S:g} s; {lost} are known to be lost")
        elif lost:
            self._say(f"{self.name}: {lost} reports are lost")

    def _put(self, call: Callable[[], None], room: int) -> None:
        if self._calls.qsize() < room:
            self._calls.put(call)
        else:
            self._dropped += 1

    def _work(self, begin: Callable[[], None]) -> None:
        if not self._try(begin, itertools.chain(_PAUSES_S, itertools.repeat(_PAUSES_S[-1]))):
            self._refused += max(0, self._calls.qsize() - 1)
            return
        while (call := self._calls.get()) is not None:
            self._refused += not self._try(call, _PAUSES_S)
        self._try(lambda: self._sink.close(failed=self._failed), _PAUSES_S)

    def _try(self, call: Callable[[], None], pauses: Iterable[float]) -> bool:
        """Whether it worked; once the run has ended there is no second try."""
        for pause in pauses:
            try:
                call()
            except Exception as error:  # whatever a library raises
                if not self._failing:
                    self._failing = True
                    then = "" if self._ending.is_set() else ": training goes on, and tries it again"
                    self._say(f"{self.name}: cannot report ({said(error)}){then}")
                if self._ending.wait(pause):
                    break
            else:
                if self._failing:
                    self._failing = False
                    self._say(f"{self.name}: reports again; {self._dropped + self._refused} reports are lost")
                return True
        return False
