"""Blocks of points side by side on the cores of a CPU: a thread for each, arithmetic within it on one core.

Products of matrices fill all cores by themselves, but what lies between them (gathering rows, looking through a tile)
would leave all cores but one idle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
T = TypeVar("T")


def threads_of(device: torch.device) -> int:
    """Blocks that are worked on at a time: as many as torch has threads on a CPU, 1 on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def each(work: Callable[[Item], T], items: Sequence[Item], device: torch.device) -> list[T]:
    """work(item) of all items, in their order. work must not run collectives, and writes where no other item does.

    Raises what the first item in order that failed raised, once none is worked on any more.
    """
    if min(threads_of(device), len(items)) <= 1:
        return [work(item) for item in items]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alike(item: Item) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(item)

    threads = torch.get_num_threads()
    pool = _pool(os.getpid(), threads)
    torch.set_num_threads(1)  # of the whole process in part: the matrix library's
    waiting = []
    try:
        waiting = [pool.submit(alike, item) for item in items]
        wait(waiting, return_when=FIRST_EXCEPTION)
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)
        torch.set_num_threads(threads)
    for future in waiting:
        if not future.cancelled() and (error := future.exception()):
            raise error
    return [future.result() for future in waiting]


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept: threads that end leave their work space of the matrix library behind. process: a fork has none of them."""
    pool, together = ThreadPoolExecutor(threads, "k-means"), Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        together.wait()

    for begun in [pool.submit(begin) for _ in range(threads)]:
        begun.result()
    return pool
