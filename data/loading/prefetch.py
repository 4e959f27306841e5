"""Work on batches ahead of their consumer: in order, by several threads, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

LEAST_ROWS = 16
"""Rows a thread takes at a time, at the least: about 1.5 ms of decoding."""


def prefetch(
    items: Iterator[T], work: Callable[[T, range], None], *, rows: int, threads: int, ahead: int
) -> Generator[T, None, None]:
    """Yield `items` in order, each after `work(item, part)` is done for parts that together are range(rows).

    `ahead` items are in work beyond the one that the consumer holds. An exception from `work` is raised when the
    item's turn comes. However the generator ends, its threads have ended with it.

    Parts are as large as leaves two in work for every thread: each costs a wait for Python's lock (two threads decode a
    fifth more images in parts of 128 than of 16).
    """
    size = min(rows, max(LEAST_ROWS, rows * ahead // (2 * threads)))
    parts = [range(start, min(start + size, rows)) for start in range(0, rows, max(1, size))]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def begin(item: T) -> tuple[T, list[Future[None]]]:
        return item, [pool.submit(work, item, part) for part in parts]

    try:
        waiting = deque(begin(item) for item in islice(items, ahead))
        while waiting:
            item, tasks = waiting.popleft()
            for task in tasks:
                task.result()
            waiting.extend(begin(following) for following in islice(items, 1))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
