"""A thread that tells the run's store where this rank is, and hears of the others from it.

    key monitor/<rank>: JSON of a counter and of `training.ranks.lost.Word`

The thread has a connection of its own and may wait in it for ever, as it does when the network is cut: whoever asks
this class for something only reads what the thread has left behind, or waits with a limit. Counters are compared,
never clocks: hosts need not agree on the time.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from training.ranks.lost import Heard, Word

BEAT_S = 1.0
_HURRY_S = 0.25
_LOOK_S = 30.0
"""Seconds between two looks at the others while nothing is wrong: a thousand ranks must not keep the store busy."""


class Heartbeat:
    """Heartbeats of rank `rank` of `world_size`; `tell` gives its word. Start it once, stop it once."""

    def __init__(self, store: Store, rank: int, world_size: int, tell: Callable[[], Word], look_s: float) -> None:
        """look_s: seconds between two looks at the others; 30 at most."""
        self.store = store
        self._rank, self._world_size, self._tell, self._look_s = rank, world_size, tell, min(look_s, _LOOK_S)
        self._heard: dict[int, tuple[int, Word, float]] = {}
        self._wake, self._asked, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._hurry = self._stop = self._first = False
        self._reached = self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def hurry(self) -> None:
        """Look at the others all the time from now on."""
        self._hurry = True
        self._wake.set()

    def heard(self) -> dict[int, Heard | None]:
        """What is known of the other ranks."""
        now, found = time.monotonic(), dict[int, Heard | None]()
        for rank in range(self._world_size):
            if rank != self._rank:
                known = self._heard.get(rank)
                found[rank] = None if known is None else Heard(known[1], now - known[2])
        return found

    @property
    def unreached(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._reached

    def first_to_say(self, within: float) -> bool:
        """Whether no other rank has asked this before; True if the store gives no answer within some seconds."""
        self._asked.set()
        self._wake.set()
        return not self._answered.wait(within) or self._first

    def stop(self, within: float) -> None:
        """Tell the last word and end; wait for that a little."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(within)

    def _run(self) -> None:
        try:
            # Of its own: a call that waits holds up all others on its connection. (Torch does not annotate `clone`.)
            store: Store = self.store.clone()  # type: ignore[attr-defined]
            for count in itertools.count():
                stop = self._stop
                self._round(store, count)
                if stop:
                    return
                self._wake.wait(_HURRY_S if self._hurry else BEAT_S)
                self._wake.clear()
        except RuntimeError:
            return  # the store is gone, which a new connection does not mend: `unreached` grows from here on

    def _round(self, store: Store, count: int) -> None:
        store.set(f"monitor/{self._rank}", json.dumps([count, *self._tell()]))
        if self._asked.is_set() and not self._answered.is_set():
            self._first = store.add("monitor/said", 1) == 1
            self._answered.set()
        if self._hurry or count == 0 or time.monotonic() - self._looked >= self._look_s:
            self._look(store)
        else:
            store.check([f"monitor/{self._rank}"])  # `set` waits for no answer, and would not notice a cut network
        self._reached = time.monotonic()

    def _look(self, store: Store) -> None:
        keys = {rank: f"monitor/{rank}" for rank in range(self._world_size) if rank != self._rank}
        if not store.check(list(keys.values())):  # `multi_get` would wait for those that have not spoken yet
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        if not keys:
            return
        now = self._looked = time.monotonic()
        for rank, text in zip(keys, store.multi_get(list(keys.values())), strict=True):
            count, *word = json.loads(text)
            if rank not in self._heard or self._heard[rank][0] != count:
                self._heard[rank] = (count, Word(*word), now)


def host_and_pid() -> tuple[str, int]:
    """Of this process."""
    return os.uname().nodename, os.getpid()
