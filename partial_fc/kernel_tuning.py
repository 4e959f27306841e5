"""Sizes of the kernels' blocks: a handful are timed on scratch tensors the first time, and the fastest is kept.

Triton's own tuner would run an update that works in place many times over, or copy what it writes, the whole weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import triton
from triton.errors import TritonError

from partial_fc.kernel_terms import Terms, interpreted

_SCRATCH_ROWS = 16896
"""Centres that a trial runs on: tiles of 64 for twice the 132 cores of an H100."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is cut and run. Blocks are powers of two from 16."""

    kept: int
    """Rows of the batch in forward, class centres in the gradient, whose sums a program keeps in registers."""
    walked: int
    """Of the others, at a time."""
    warps: int
    stages: int
    """Blocks on their way from memory at a time."""


_INTERPRETED = Launch(64, 32, 1, 1)
"""So that small tests meet several blocks and their ends."""
_chosen: dict[Hashable, Launch] = {}
_TURNS, _RUNS, _PAUSE = 5, 4, 20_000_000
"""Of a trial: turns, runs in each, and cycles before it, some 10 ms."""


def launches(dim: int, product_dtype: torch.dtype) -> Sequence[Launch]:
    """Those worth a trial, for rows of `dim` columns (a power of two).

    The last of each list is for GPUs with 100 kB of shared memory. In float32, on CUDA cores, every product is
    unrolled: larger blocks would take long to compile.
    """
    if product_dtype == torch.float32:
        return [Launch(32, 32, 8, 1), Launch(16, 16, 4, 1)]
    if dim > 256:
        wide = [Launch(64, 64, 8, 2), Launch(64, 32, 8, 3), Launch(64, 128, 8, 1)]
    else:
        wide = [Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(128, 128, 8, 2), Launch(64, 64, 4, 3)]
    return [*wide, Launch(32, 32, 8, 1)]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a GPU's own time, on average, of the best of some turns.

    The stream is held up while the host launches a turn: with a slow or busy host, launches would be timed in place of
    kernels, and a worse one be chosen for good.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: list[float] = []
    with torch.cuda.device(device):
        work()  # compiles
        for _ in range(_TURNS):
            torch.cuda.synchronize()
            torch.cuda._sleep(_PAUSE)
            begin.record()
            for _ in range(_RUNS):
                work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / _RUNS)
    return min(found)


def fastest(kind: Hashable, terms: Terms, prepare: Callable[[], Callable[[Launch], object]]) -> Launch:
    """The launch whose trial takes least, remembered for the life of the process by GPU, kind and the terms' sizes.

    prepare: makes what a trial works on, and gives the trial. Raises RuntimeError when the GPU can run no launch. Under
    the interpreter no trial is made.
    """
    if interpreted():
        return _INTERPRETED
    N, D = terms.x_ND.shape
    # A trial on fewer centres than usual speaks for no others.
    sizes = (N.bit_length(), D, min(len(terms.w_CD), _SCRATCH_ROWS))
    key = (kind, terms.x_ND.device, *sizes, terms.w_CD.dtype, terms.product_dtype)
    if key not in _chosen:
        trial = prepare()
        milliseconds: dict[Launch, float] = {}
        for launch in launches(triton.next_power_of_2(D), terms.product_dtype):
            try:
                milliseconds[launch] = timed(functools.partial(trial, launch), terms.x_ND.device)
            except TritonError:  # too large for the GPU, or for its compiler
                continue
        if not milliseconds:
            raise RuntimeError(f"no block size of the kernels fits this GPU at D = {D}")
        _chosen[key] = min(milliseconds, key=milliseconds.__getitem__)
    return _chosen[key]


def scratch(terms: Terms, times: int = 1) -> Terms:
    """The same batch against some centres of no meaning, for a trial. times: how many times as many as usual."""
    C, device = min(len(terms.w_CD), times * _SCRATCH_ROWS), terms.w_CD.device
    generator = torch.Generator(device).manual_seed(0)  # its own: dropout's draws must not depend on trials
    w_CD = torch.randn(C, terms.w_CD.shape[1], device=device, generator=generator).to(terms.w_CD.dtype)
    rows_C = None if terms.rows_S is None else torch.arange(C, device=device)
    owner_C = None if terms.owner_C is None else terms.owner_C[:C]
    return dataclasses.replace(terms, w_CD=w_CD, rows_S=rows_C, owner_C=owner_C)
