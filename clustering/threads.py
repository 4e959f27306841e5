"""Blocks of points side by side on the cores of a CPU: a thread for each, arithmetic within it on one core.

Products of matrices fill all cores by themselves, but what lies between them (gathering rows, looking through a tile)
would leave all cores but one idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


def threads_of(device: torch.device) -> int:
    """Blocks that are worked on at a time: as many as torch has threads on a CPU, 1 on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def each(work: Callable[[I], T], items: Sequence[I], device: torch.device) -> list[T]:
    """work(item) of all items, in their order. work must not run collectives, and writes where no other item does.

    Raises what the first item that failed raised.
    """
    threads = min(threads_of(device), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of every thread that begins from here on
    try:
        return list(_pool(before).map(work, items))
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept: threads that end leave their work space of the matrix library behind."""
    return ThreadPoolExecutor(threads, "k-means", initializer=torch.set_num_threads, initargs=(1,))
