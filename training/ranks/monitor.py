"""Who hangs: every rank says where it is, a thread watches it, and a line names the rank that the others miss.

Two daemon threads. One posts heartbeats to the run's store and may be stuck in it (`training.ranks.heartbeat`). The
other, which this file holds, touches no store: it sees that the main thread makes no progress, asks what the heartbeats
tell, says it, and ends the process, as the main thread sits in C++ and cannot. Gloo's collectives give up by themselves
after `train.timeout` with an exception, so there the thread waits a little longer, for what is no collective; NCCL's do
not return to Python, so there it speaks first and leaves NCCL's watchdog the time to write its flight recorder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from torch._C._distributed_c10d import Store

from training.ranks.heartbeat import Heartbeat, host_and_pid
from training.ranks.lost import EXIT_LOST, LostRankError, Word, first_line, says_a_rank_is_lost, whom_to_blame
from training.ranks.operation import operation_of_error, operation_of_thread

RECORDS = "records"
"""Phase in which a rank opens its data: that may take long and says itself how it goes, so it is not watched."""
CLOSING = "closing"
"""Phase at the end of a run in which logs and pictures are written and other places told, each within its own limit: it
is not watched either."""
START_S = 600.0
"""Least patience until the first step is done: hosts open large sets and build kernels at their own pace."""
NCCL_LATER_S = 10.0
"""Seconds by which NCCL's own timeout comes after ours."""
_GLOO_EARLIER_S = 4.0
_TICK_S = 0.5
_STALLED_S = 2.0
"""A main thread that has said nothing for so long is looked at, and its operation told to the others."""
_EVIDENCE_S = 3.0
"""Seconds to find out who is silent; a rank that ended by an exception has told by then."""
_ANSWER_S = 1.5
_CLOSING_S = 2.0
_DUMP_S = NCCL_LATER_S + 30
_log = logging.getLogger(__name__)


class Monitor:
    """Watches this rank while it is entered, in its main thread. One that is not entered, or is alone, does nothing.

    `at` and `moved` are free: they write attributes. On the way out, an exception that says that a rank is lost
    becomes a LostRankError of one line; the reason of any other is told to the other ranks.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        timeout: float = 600,
        cuda: bool = False,
    ) -> None:
        self.closing: list[Callable[[], object]] = []
        """What to call, if it is quick, before the process is ended: logs."""
        self.steps = 0
        """Steps that this process has begun: in the first the timeout is START_S at least."""
        self._rank, self._timeout, self._cuda = rank, timeout, cuda
        self._place, self._moves = (0, "start"), 0
        self._idle, self._ended, self._bereft = 0.0, "", False
        self._lost_in = ""
        self._host, self._pid = host_and_pid()
        self._main = threading.get_ident()
        self._over, self._saying = threading.Event(), threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._beat: Heartbeat | None = None
        if store is not None and world_size > 1:
            self._beat = Heartbeat(store, rank, world_size, self._word, timeout / 4)

    def at(self, step: int, phase: str) -> None:
        """The main thread begins something: `step` optimizer steps are done, and this comes now."""
        self._place = (step, phase)
        self._moves += 1

    def moved(self) -> None:
        """The main thread has come a bit further in the same."""
        self._moves += 1

    def __enter__(self) -> Monitor:
        if self._beat is not None:
            self._main = threading.get_ident()
            self._beat.start()
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beat is None:
            return
        self._over.set()
        if not self._saying.acquire(blocking=False):
            self._watcher.join()  # it is saying why, and ends the process
        if error is None or not says_a_rank_is_lost(error):
            self._ended = "done" if error is None else first_line(error)
            self._beat.stop(_ANSWER_S)
            return
        self._bereft, self._lost_in = True, operation_of_error(trace)
        line = self._line(self._lost_in, f" [{first_line(error)}]")
        first = self._beat.first_to_say(_ANSWER_S)
        self._ended = first_line(error)
        self._beat.stop(_ANSWER_S)
        raise LostRankError(line if first else "") from error

    def _word(self) -> Word:
        step, phase = self._place
        operation = self._lost_in
        if not operation and self._idle > _STALLED_S and not self._ended:
            operation = operation_of_thread(self._main)
        return Word(self._host, self._pid, step, phase, self._moves, self._idle, operation, self._ended, self._bereft)

    def _watch(self) -> None:
        later = 0 if self._cuda else _GLOO_EARLIER_S
        moves, before, warned = -1, time.monotonic(), False
        while not self._over.wait(_TICK_S):
            now = time.monotonic()
            # Time that the whole process was stopped, by a signal or with its machine, is nobody's hang.
            self._idle += min(now - before, 2 * _TICK_S)
            before = now
            if self._moves != moves or self._place[1] in (RECORDS, CLOSING):
                moves, self._idle = self._moves, 0.0
            if not warned and self._unreachable(max(10.0, self._timeout / 2)):
                warned = True
                _log.warning(
                    "rank %d cannot reach the store at %s: the network, or rank 0's host", self._rank, _store()
                )
            limit = self._timeout if self.steps > 1 else max(self._timeout, START_S)
            if self._idle > limit + later and self._saying.acquire(blocking=False):
                self._give_up()

    def _unreachable(self, seconds: float) -> str:
        """The store's address if it has not answered for so long."""
        return _store() if self._beat is not None and self._beat.unreached > seconds else ""

    def _give_up(self) -> None:
        assert self._beat is not None
        line = self._line(operation_of_thread(self._main), "")
        if self._beat.first_to_say(_ANSWER_S):
            # Not by sys.stderr, whose lock the main thread may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"error: {line}\n".encode())
        closer = threading.Thread(target=self._close, daemon=True)
        closer.start()
        closer.join(_CLOSING_S)
        self._ended, self._bereft = f"no progress for {self._idle:.0f} s", True
        self._beat.stop(_ANSWER_S)
        if self._cuda:
            time.sleep(_DUMP_S)  # NCCL's watchdog ends the process earlier if it waits in a collective
        os._exit(EXIT_LOST)

    def _close(self) -> None:
        for close in self.closing:
            with contextlib.suppress(Exception):
                close()

    def _line(self, operation: str, said: str) -> str:
        """What happened, once the others have been looked at for a while."""
        assert self._beat is not None
        self._beat.hurry()
        deadline = time.monotonic() + _EVIDENCE_S
        while time.monotonic() < deadline:
            heard = [each.word for each in self._beat.heard().values() if each is not None]
            if any(word.ended not in ("", "done") and not word.bereft for word in heard):
                break
            time.sleep(_TICK_S / 5)
        mine = self._word()._replace(operation=operation)
        unreachable = self._unreachable(_EVIDENCE_S - _TICK_S)
        who, cure = whom_to_blame(self._beat.heard(), rank=self._rank, mine=mine, unreachable=unreachable)
        waited = f" for {self._idle:.0f} s" if self._idle > _STALLED_S else ""
        return f"{who}; {mine.who(self._rank)} has waited{waited} at {mine.where()}{said}: {cure}"


def _store() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
