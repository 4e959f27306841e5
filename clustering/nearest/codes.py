"""Unit rows as whole numbers of 7 and 8 bits, and their products, which a CPU multiplies faster than float32. Ours.

A row x of D numbers is turned by a random rotation R, the same for all rows, and rounded: R x = step (code + e) with
|e_i| <= 1/2. For a point x and a centre c with steps s and t, the product of the codes, exact, gives their cosine up to

    s e . R c + t e' . R x

As R is random, the e_i are spread evenly over -1/2 ... 1/2 and know nothing of R c: each of the terms has a variance of
step^2 / 12, and tails below those of the normal distribution with it. So the cosine is within

    6 sqrt((s^2 + t^2) / 12)

but for one pair in 3 x 10^7 (2 exp(-6^2 / 2) of them). At D = 512 that is 0.005. R turns blocks of 64 numbers, each in
a way of its own: a whole rotation would cost eight times as much and spread a row little better. But a block that holds
nearly all of a row's length leaves the others to round to 0, and those errors do know each other. With thousands of
other numbers they add up (D = 20,000, 95% in a block: nine deviations); to E = 4096 they stay within the six, and
beyond it nothing is coded.

Points have codes of 7 bits, centres of 8: processors without instructions for whole-number dot products add two
products of a code in 16 bits, and 2 x 127 x 127 fits.

Legend: b points, s centres, t of a tile, D embedding size, E the same filled up to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_TURNED = 64
_POINT, _CENTRE = 63, 127
"""Largest code of a point and of a centre."""
_ZERO = 64
"""Stands for 0 in a point's code, which has no sign."""
_DEVIATIONS = 6.0
_WIDEST = 4096
"""Of E. (Sums of 32 bits would do to 133,000.)"""
_ROUNDING = 4e-6


@lru_cache(maxsize=1)
def can_multiply() -> bool:
    """Whether this build of torch multiplies codes, told by a product with the largest codes that there are.

    Its operators for quantised linear layers do it, on x86 processors; they are no promised interface.
    """
    codes = Codes(torch.full((3, 64), _ZERO + _POINT, dtype=torch.uint8), torch.ones(3))
    codes.code_bE[1] = _ZERO - _POINT
    try:
        code_sE = torch.full((5, 64), -_CENTRE, dtype=torch.int8)
        centres = CodedCentres([(code_sE[:4], torch.ones(4)), (code_sE[4:], torch.ones(1))], tile=4)
        found = torch.cat([cosine_bt for _, cosine_bt in centres.products(codes)], dim=1)
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = -_POINT * _CENTRE * 64.0 * torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, 5)
    return torch.equal(found, expected)


@dataclass(frozen=True, slots=True)
class Codes:
    """Of points."""

    code_bE: Tensor
    """uint8: 64 stands for 0."""
    step_b: Tensor
    """float32."""

    def __getitem__(self, part: slice | Tensor) -> Codes:
        return Codes(self.code_bE[part], self.step_b[part])


class CodedCentres:
    """Tile by tile, as the product takes them."""

    def __init__(self, tiles: Iterable[tuple[Tensor, Tensor]], *, tile: int) -> None:
        """tiles: int8 (t, E) and steps, float32 (t,). tile: centres of one, but for the last."""
        self._packed, self._step = [], []
        for code_tE, step_t in tiles:
            self._packed.append(torch.ops.onednn.qlinear_prepack(code_tE, None))
            self._step.append(step_t)
        self._largest = max(float(step_t.max()) for step_t in self._step)
        self._tile = tile
        self._zero_t = torch.zeros(tile, dtype=torch.int64)

    def products(self, codes: Codes) -> Iterator[tuple[int, Tensor]]:
        """Of each tile the place of its first centre, and the cosines, each over its point's step: float32 (b, t)."""
        for number, (packed, step_t) in enumerate(zip(self._packed, self._step, strict=True)):
            yield number * self._tile, torch.ops.onednn.qlinear_pointwise(
                codes.code_bE, 1.0, _ZERO, packed, step_t, self._zero_t[: len(step_t)],
                None, 1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip

    def errors(self, codes: Codes) -> Tensor:
        """How far the cosines may be off, float32 (b,)."""
        return _DEVIATIONS * ((codes.step_b.square() + self._largest**2) / 12).sqrt() + _ROUNDING


def can_code(dim: int) -> bool:
    """Whether codes of rows of D numbers can be compared here, with errors as small as they say."""
    return dim <= _WIDEST and can_multiply()


class Rotation:
    """Of rows of D numbers."""

    def __init__(self, dim: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-dim // _TURNED)
        gauss = torch.randn(blocks, _TURNED, _TURNED, dtype=torch.float64, generator=generator)
        self._blocks = torch.linalg.qr(gauss).Q.float().unbind()
        self.width = blocks * _TURNED
        """E."""

    def turned(self, x_bD: Tensor) -> Tensor:
        """float32 (b, E)."""
        left = self.width - x_bD.shape[1]
        x_bE = F.pad(x_bD, (0, left)) if left else x_bD
        turned_bE = torch.empty_like(x_bE)
        for number, block in enumerate(self._blocks):
            part = slice(number * _TURNED, (number + 1) * _TURNED)
            torch.mm(x_bE[:, part], block, out=turned_bE[:, part])
        return turned_bE


def code_points(turned_bE: Tensor) -> Codes:
    """turned_bE: float32, no longer than unit rows, of random direction; overwritten."""
    code_bE, step_b = _rounded(turned_bE, _POINT)
    return Codes(code_bE.add_(_ZERO).to(torch.uint8), step_b)


def code_centres(centres_sD: Tensor, turned: Callable[[Tensor], Tensor], *, tile: int) -> CodedCentres:
    """centres_sD: float32, no longer than unit rows; s >= 1. turned: as the points are; what it
    returns is overwritten. tile: centres of one.
    """

    def codes(part_tD: Tensor) -> tuple[Tensor, Tensor]:
        code_tE, step_t = _rounded(turned(part_tD), _CENTRE)
        return code_tE.to(torch.int8), step_t

    return CodedCentres(map(codes, centres_sD.split(tile)), tile=tile)  # one at a time: they stay in a core's cache


def _rounded(x_bE: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes as float32, in place, and steps; a step for rows of zeros too."""
    length_b = x_bE.amax(1).maximum(-x_bE.amin(1))  # twice as fast as abs().amax()
    step_b = (length_b / largest).clamp_min_(torch.finfo(torch.float32).tiny)
    return x_bE.div_(step_b[:, None]).round_(), step_b
