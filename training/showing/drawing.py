"""Pictures drawn by a thread while training goes on: ranks do not wait for the one that draws."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Drawing(Generic[T]):
    """Draws one after the other, and hands each to who wants it in the thread that asks.

    The thread is a daemon: a picture that takes long, as of images in a store far away, keeps no process from its end.
    """

    def __init__(self, name: str) -> None:
        """name: of the thread."""
        self._name = name
        self._thread: threading.Thread | None = None
        self._jobs = queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]()
        self._pending: deque[tuple[Future[T], Callable[[Callable[[], T]], None]]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether all that was begun has been handed over."""
        return not self._pending

    def begin(self, draw: Callable[[], T], show: Callable[[Callable[[], T]], None]) -> None:
        """Have a picture drawn. Nobody may change meanwhile what `draw` reads. show: is given a function that returns
        the picture, or raises what `draw` raised.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        drawn = Future[T]()
        self._pending.append((drawn, show))
        self._jobs.put((drawn, draw))

    def show(self, *, within: float = 0.0) -> None:
        """Call `show` of those that are drawn, in their order; wait for the others for so many seconds at most."""
        if within:
            wait([drawn for drawn, _ in self._pending], within)
        while self._pending and self._pending[0][0].done():
            drawn, show = self._pending.popleft()
            show(drawn.result)

    def close(self, *, within: float) -> None:
        """`show`, and draw no more of those that are waiting then."""
        self.show(within=within)
        for drawn, _ in self._pending:
            drawn.cancel()
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            drawn, draw = job
            if drawn.set_running_or_notify_cancel():
                try:
                    drawn.set_result(draw())
                except BaseException as error:  # whoever asks for the picture gets it
                    drawn.set_exception(error)
