"""What the matrix products of a step would take alone, at the rate that this machine reaches in the same run.

Legend: N rows of the global batch, D embedding size, S class centres that take part.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_CPU_TILE = 2048  # centres a product on a CPU: x (N, D) by a tile (2048, D), which stays in its cache
_GPU_SIDE = 8192
_SECONDS = 0.5  # of trying, on CPUs; the best try counts
_GPU_TRIES = 30


def head_flops(rows: int, dim: int, centres: int) -> float:
    """Of the four products of a step that keeps no logits: these, embedding gradient, these again, centre gradient."""
    return 8.0 * rows * dim * centres


def gemm_peak(device: torch.device, rows: int, dim: int) -> tuple[float, str]:
    """Flops a second of the fastest of many products, and which products these were.

    CUDA: bf16, 8192 on each side. CPU: float32, (rows, dim) by (dim, 2048), as a tile of the head has it.
    """
    if device.type == "cuda":
        a, b = (torch.randn(_GPU_SIDE, _GPU_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * _GPU_SIDE**3 / _best_cuda(lambda: torch.mm(a, b, out=out)), f"bf16, {_GPU_SIDE} on each side"
    a, b = torch.randn(rows, dim), torch.randn(_CPU_TILE, dim)
    out = torch.empty(rows, _CPU_TILE)
    flops = 2.0 * rows * dim * _CPU_TILE
    return flops / _best_cpu(lambda: torch.mm(a, b.T, out=out)), f"fp32, ({rows}, {dim}) by ({dim}, {_CPU_TILE})"


def _best_cuda(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_GPU_TRIES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return best


def _best_cpu(work: Callable[[], object]) -> float:
    best, stop = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best
