"""Ends that are asked for by signals: all ranks stop after the same step, with a checkpoint.

Kubernetes and torchrun announce an end by SIGTERM, Slurm by what `--signal` names (SIGUSR1 here), a person by Ctrl-C.
Whoever starts the command again goes on from there.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from partial_fc.collectives import extremes
from training.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. Batch systems may requeue by it."""
_LAG_GPU, _LAG_CPU = 4, 1
"""Steps until the ranks' word is heard: so long a GPU may be behind its host, and nobody waits for it."""
_IMPATIENT_S = 3.0
"""Ctrl-C reaches a rank twice, from the terminal and from torchrun; later than this, a person means it."""


class _Word(NamedTuple):
    """The highest signal that any rank has got by a step, on its way."""

    highest: torch.Tensor
    work: dist.Work | None
    here: torch.cuda.Event | None


class Stopped(Exception):  # noqa: N818  an order, not an error
    """All ranks are to stop here, with a checkpoint. The message names the signal."""


class Signals:
    """A context manager, in the main thread: in it the signals only leave a mark.

    A second Ctrl-C some seconds after the first raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.got, self._since = 0, 0.0
        """got: number of the first that came, 0 for none."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._mark) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _mark(self, number: int, _: FrameType | None) -> None:
        if self.got and number == signal.SIGINT and time.monotonic() - self._since > _IMPATIENT_S:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self._since = number, time.monotonic()


class StopRequest:
    """Whether to stop, on all ranks alike."""

    def __init__(self, ranks: Ranks, signals: Signals) -> None:
        self._ranks, self._signals, self._cuda = ranks, signals, ranks.device.type == "cuda"
        self._lag = _LAG_GPU if self._cuda else _LAG_CPU
        self._words: deque[_Word] = deque()

    def check(self) -> None:
        """Raise Stopped, on all ranks, when `due`. Call it as often on all of them."""
        if name := self.due():
            raise Stopped(name)

    def check_now(self) -> None:
        """The same, without a delay. One all-reduce; waits for it."""
        _, highest = extremes(self._signals.got, self._ranks.group, self._ranks.device)
        if highest:
            raise Stopped(_name(highest))

    def due(self) -> str:
        """Name of a signal that some rank has got, the same on all of them, or "". Call it after every step.

        One all-reduce of one number, which is not waited for: its result is that of the call some steps later.
        """
        if self._ranks.world_size == 1:
            return _name(self._signals.got)
        self._words.append(self._send())
        if len(self._words) <= self._lag:
            return ""
        highest, work, here = self._words.popleft()
        if here is not None:
            here.synchronize()
        elif work is not None:
            work.wait()
        return _name(int(highest.item()))

    def _send(self) -> _Word:
        highest = torch.full((1,), self._signals.got, dtype=torch.int32, device=self._ranks.device)
        work = dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True)
        if not self._cuda:
            return _Word(highest, work, None)
        work.wait()  # the stream, not the host
        host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        host.copy_(highest, non_blocking=True)
        here = torch.cuda.Event()
        here.record()
        return _Word(host, None, here)


def _name(number: int) -> str:
    return signal.Signals(number).name if number else ""
