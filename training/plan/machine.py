"""How fast this machine's CPU is at small pieces of a training's work: some seconds, before a plan for CPUs.

Medians of several turns, so that other work on the same cores disturbs little; what it takes for good shows in the
plan, as it would in a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_fc.sampling import sample_rows
from sharding import Shard
from training.plan.work import Resource

_TURNS = 5
_ROWS, _DIM, _TILE = 128, 512, 2048
_CHANNELS, _SIDE, _IMAGES = 64, 56, 4
_CLASSES, _CALLS = 1 << 16, 64


Clock = Callable[[], float]


def measure(turns: int = _TURNS, clock: Clock = time.perf_counter) -> dict[Resource, float]:
    """Units a second, as `work` counts them, with the threads that torch has now. Leaves torch's generator alone."""
    generator = torch.Generator().manual_seed(0)
    x_ND, w_cD = torch.randn(_ROWS, _DIM, generator=generator), torch.randn(_TILE, _DIM, generator=generator)
    cosine_cN = (w_cD @ x_ND.T) / _DIM

    def seconds(work: Callable[[], object], repeats: int = 1) -> float:
        return _median(work, turns, repeats, clock)

    product = 2.0 * _ROWS * _DIM * _TILE / seconds(lambda: w_cD @ x_ND.T, 4)
    convolve, flops = _convolution(generator)
    move, moved = _moving(generator)
    return {
        "convolution": flops / seconds(convolve),
        "product": product,
        "head": product,
        "contrast": product,
        "kmeans": product,
        "logit": _ROWS * _TILE / seconds(lambda: _exponentials(cosine_cN), 4),
        "draw": _CLASSES / seconds(_draw),
        "moved": moved / seconds(move, 2),
        "call": _CALLS / seconds(_small_calls),
    }


def _median(work: Callable[[], object], turns: int, repeats: int, clock: Clock) -> float:
    """Seconds of one, after a turn of warm-up."""
    found = []
    for turn in range(-1, turns):
        began = clock()
        for _ in range(repeats):
            work()
        if turn >= 0:
            found.append((clock() - began) / repeats)
    return statistics.median(found)


def _exponentials(cosine_cN: Tensor) -> Tensor:
    """As the head's tiles take them (`partial_fc.tiles`)."""
    e_cN = (cosine_cN * 30.0).exp_()
    return e_cN.mul_(e_cN.sum(0))


def _convolution(generator: torch.Generator) -> tuple[Callable[[], None], float]:
    """Forward and backward, channels last; and its flops."""
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    x = _images(generator)
    weight.requires_grad_()

    def once() -> None:
        F.conv2d(x, weight, padding=1).sum().backward()

    return once, 3 * 2.0 * 9 * _CHANNELS**2 * _SIDE**2 * _IMAGES


def _images(generator: torch.Generator) -> Tensor:
    x = torch.randn(_IMAGES, _CHANNELS, _SIDE, _SIDE, generator=generator)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def _moving(generator: torch.Generator) -> tuple[Callable[[], None], float]:
    """BatchNorm and PReLU, forward and backward: what an IResNet has between its convolutions. And the bytes of it."""
    x = _images(generator)
    slope_C = torch.full((_CHANNELS,), 0.25, requires_grad=True)
    gain_C, bias_C = torch.ones(_CHANNELS, requires_grad=True), torch.zeros(_CHANNELS, requires_grad=True)
    gradient = torch.ones_like(x)

    def once() -> None:
        F.prelu(F.batch_norm(x, None, None, gain_C, bias_C, training=True), slope_C).backward(gradient)

    return once, 11.0 * x.nbytes  # read and written: 2 + 2 forward, 3 + 4 backward


def _draw() -> None:
    sample_rows(torch.full((_ROWS,), -1), Shard(0, _CLASSES), _CLASSES, 0.1, seed=0, step=0)


def _small_calls() -> None:
    x = torch.zeros(8)
    for _ in range(_CALLS):
        x.add_(1.0)
