"""Processes in which Triton runs its kernels as Python, or compiles them, whatever the test's own process has set."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc.kernels import why_not

Run = Callable[..., Any]
needs_triton = pytest.mark.skipif(
    "triton is not installed" in why_not(torch.ones(1, 1), torch.ones(1, 1)), reason="triton"
)


def fresh_process(interpret: bool, cache: Path) -> Iterator[Run]:
    """Runs functions in a process of its own: Triton reads its switch once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    with pool:
        yield lambda fn, *args: pool.submit(fn, *args).result(timeout=120)
