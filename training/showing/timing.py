"""Time spent in a part of the step, without making the step wait for the GPU."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from torch.autograd import profiler


class Stopwatch:
    """Context manager that adds up time: by the wall clock on CPUs, by events in the stream on GPUs."""

    def __init__(self, device: torch.device, name: str = "") -> None:
        """name: of the part, as traces of the profiler show it; empty: they do not."""
        self._cuda, self._name = device.type == "cuda", name
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._started = 0.0
        self._running = False
        self._region: profiler.record_function | None = None

    def __enter__(self) -> Stopwatch:
        if self._name and profiler._is_profiler_enabled:
            self._region = profiler.record_function(self._name)
            self._region.__enter__()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._region is not None:
            self._region.__exit__(kind, error, trace)
            self._region = None

    def start(self) -> None:
        """Where a `with` cannot begin: in a hook of the backward pass."""
        self._running = True
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._events.append((begin, end))
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """The end of what `start` began; nothing when it has not been called."""
        if not self._running:
            return
        self._running = False
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call, and start again from 0. Waits for the GPU: call it when logging."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
