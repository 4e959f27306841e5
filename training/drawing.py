"""Pictures of results drawn by a thread while training goes on: ranks do not wait for the one that draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from evaluation.plots import Drawn


class Drawing:
    """Draws one picture after the other, and hands each to who wants it in the thread that asks."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[Drawn], Callable[[Callable[[], Drawn]], None]]] = deque()

    def begin(self, draw: Callable[[], Drawn], show: Callable[[Callable[[], Drawn]], None]) -> None:
        """Have a picture drawn. Nobody may change meanwhile what `draw` reads. show: is given a function that returns
        the picture, or raises what `draw` raised.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._pending.append((self._pool.submit(draw), show))

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
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
