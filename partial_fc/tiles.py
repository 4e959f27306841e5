"""Tiles of class centres: which rows a tile takes, its cosines and exponentials, and its share of the centres'
gradient.

Everything lies classes first, (c, N): a tile's rows are its classes. A class may have K sub-centres, rows c K … c K +
K - 1 of the weight; its cosine is the largest of theirs, and its gradient goes to that one.

Legend: N rows of the global batch, D embedding size, C classes of this shard, S of them sampled, c classes of one tile,
K sub-centres a class, k = c K rows of a tile, R = C K rows of the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from configs.head import Impl
from partial_fc.kernel_terms import Terms
from partial_fc.negatives import Negatives
from partial_fc.products import product

MIN_NORM = 1e-12
_MAX_EXPONENT = 85.0  # exp(88.7) is float32's end; the rest is left for the products with S
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Size of one fp32 tile, (c, N) or (c, D): measured best on a CPU core (docs/experiments.md); large products on
GPUs."""
KEPT_BYTES = 256 << 20
"""Cosines that a step's forward passes keep for the optimizer, which spares it a matrix product; tiles beyond are made
again."""


def shift_for(scale: float, num_classes: int) -> float:
    """The constant a such that sum_c exp(s cos_c - a) stays below float32's end for any embedding.

    0 for s = 64 up to 10^9 classes. Smaller is better: what underflows is exp(-s - a). Ours.
    """
    return max(0.0, scale + math.log(max(num_classes, 1)) - _MAX_EXPONENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxSettings:
    """What does not change from step to step."""

    scale: float
    num_classes: int
    """Classes of all shards together."""
    first_class: int = 0
    """The shard's; stochastic rounding draws its lots by class."""
    subcentres: int = 1
    """K: rows of the weight that a class has."""
    impl: Impl = "auto"
    """auto: triton where it can run, else torch. reference: dense, plain autograd."""
    chunk: int = 0
    """Classes a tile; 0 sizes tiles by the batch and the device."""
    kept_bytes: int = KEPT_BYTES
    product_dtype: torch.dtype = torch.float32
    """Operands of the matrix products; sums are float32 whatever it is."""
    sparse_gradient: bool = True
    """Of sampled classes: a sparse gradient, of their rows alone; False: a dense one with zeros elsewhere."""

    def tile(self, x_ND: Tensor) -> int:
        """Classes a tile, for this batch: neither their logits nor their centres are to take more than the bytes
        above."""
        wider = max(1, *x_ND.shape)
        return self.chunk or max(64, TILE_BYTES.get(x_ND.device.type, 64 << 20) // (4 * wider * self.subcentres))


class SampledRows(NamedTuple):
    """Classes of a shard that take part in a step."""

    rows_S: Tensor
    """int64, rising; at the end there may be padding, which holds the shard's size."""
    sure: int
    """The first ones, known to be no padding."""
    draw: int
    """Of what was drawn by lot: equal numbers, equal classes."""

    def trimmed(self, size: int) -> Tensor:
        """Without the padding. One host sync."""
        return self.rows_S[: int((self.rows_S < size).sum())]


@dataclass(frozen=True, slots=True)
class Tile:
    """Classes `start` … `stop` of the shard, or of its sampled classes."""

    start: int
    stop: int
    classes_c: Tensor | None
    """Of sampled classes: which ones."""
    padded: bool
    """Whether some of classes_c may be padding."""

    def take(self, rows_RD: Tensor, subcentres: int) -> Tensor:
        """Their rows, (k, D): a view where they lie together. Padding takes the shard's last class."""
        if self.classes_c is None:
            return rows_RD[self.start * subcentres : self.stop * subcentres]
        classes_c = self.classes_c
        if self.padded:
            classes_c = classes_c.clamp_max(len(rows_RD) // subcentres - 1)
        # index_select copies whole rows; indexing with [] took three times as long on CPUs.
        wide_CE = rows_RD.view(-1, subcentres * rows_RD.shape[1])
        return wide_CE.index_select(0, classes_c).view(-1, rows_RD.shape[1])

    def put(self, rows_RD: Tensor, values_kD: Tensor, subcentres: int) -> None:
        """Write values where `take` read them; padding is not written. No host sync."""
        if self.classes_c is None:
            at_kD = self.take(rows_RD, subcentres)
            if at_kD.data_ptr() != values_kD.data_ptr():
                at_kD.copy_(values_kD)
            return
        rows_CKD, values_cKD = (t.view(-1, subcentres, rows_RD.shape[1]) for t in (rows_RD, values_kD))
        classes_c = self.classes_c
        if self.padded:
            # Padding writes the last class before it once more, the same bytes; a tile of nothing else writes what is
            # there.
            real_c = classes_c < len(rows_CKD)
            source_c = torch.arange(len(classes_c), device=classes_c.device).minimum((real_c.sum() - 1).clamp_min(0))
            classes_c = classes_c[source_c].clamp_max(len(rows_CKD) - 1)
            values_cKD = torch.where(real_c[source_c][:, None, None], values_cKD[source_c], rows_CKD[classes_c])
        rows_CKD.index_copy_(0, classes_c, values_cKD)

    def add_rows(self, out_kD: Tensor, row_R: Tensor, values_RD: Tensor, subcentres: int) -> None:
        """Add values to those rows of the weight, int64 row_R, that are this tile's; the others are left. No host
        sync."""
        class_R = row_R // subcentres
        if self.classes_c is None:
            place_R = class_R - self.start
            here_R = (place_R >= 0) & (place_R < self.stop - self.start)
            place_R = place_R.clamp(0, self.stop - self.start - 1)
        else:
            place_R = torch.searchsorted(self.classes_c, class_R).clamp_max(len(self.classes_c) - 1)
            here_R = self.classes_c[place_R] == class_R
        if out_kD.is_cuda or here_R.any():  # a look costs nothing on CPUs and spares much, on GPUs the other way round
            values_RD = torch.where(here_R[:, None], values_RD, 0).to(out_kD.dtype)
            out_kD.index_add_(0, place_R * subcentres + row_R % subcentres, values_RD)


def tiles_of(size: int, step: int, sampled: SampledRows | None) -> Iterator[Tile]:
    """The tiles of `size` classes, or of the sampled ones."""
    if sampled is not None:
        size = len(sampled.rows_S)
    for start in range(0, size, step):
        stop = min(start + step, size)
        if sampled is None:
            yield Tile(start, stop, None, False)
        else:
            yield Tile(start, stop, sampled.rows_S[start:stop], stop > sampled.sure)


def position_of(target_N: Tensor, sampled: SampledRows | None) -> Tensor:
    """Where each target stands among the classes that take part, -1 for none here."""
    if sampled is None or not len(sampled.rows_S):
        return target_N
    return torch.where(target_N >= 0, torch.searchsorted(sampled.rows_S, target_N), -1)


class TileMath:
    """Cosines, exponentials and gradients of tiles, for one batch."""

    def __init__(
        self,
        x_ND: Tensor,
        position_N: Tensor,
        size: int,
        settings: SoftmaxSettings,
        negatives: Negatives | None,
    ) -> None:
        """position_N: the target's place among the classes that take part, -1 for none. size: C."""
        self.x_ND, self.position_N, self.size = x_ND, position_N, size
        self.settings, self.negatives = settings, negatives
        bound = 1.0 if negatives is None else negatives.bound
        self.shift = shift_for(settings.scale * bound, settings.num_classes)

    def at(self, position_N: Tensor) -> TileMath:
        """The same batch, its targets standing elsewhere."""
        return TileMath(self.x_ND, position_N, self.size, self.settings, self.negatives)

    def for_kernels(self, w_CD: Tensor, target_N: Tensor, rows_S: Tensor | None) -> Terms:
        """The same batch, as the Triton kernels take it. target_N: class of this shard, not its position."""
        return Terms(
            x_ND=self.x_ND,
            w_CD=w_CD,
            target_N=target_N,
            rows_S=rows_S,
            scale=self.settings.scale,
            shift=self.shift,
            negatives=self.negatives,
            product_dtype=self.settings.product_dtype,
        )

    def cosines(self, raw_kD: Tensor) -> tuple[Tensor, Tensor]:
        """(k, N), and the inverse lengths (k,) of the raw centres."""
        inverse_k = torch.linalg.vector_norm(raw_kD, dim=1).clamp_min_(MIN_NORM).reciprocal_()
        return product(raw_kD, self.x_ND.T, self.settings.product_dtype).mul_(inverse_k[:, None]), inverse_k

    def exponentials(self, tile: Tile, cosine_kN: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """exp(s value - shift), (c, N), 0 for targets and padding; the values' slope, None for 1; the sub-centre whose
        cosine it is, None where there is but one."""
        cosine_cN, best_cN = cosine_kN, None
        if self.settings.subcentres > 1:
            cosine_cN, best_cN = cosine_kN.unflatten(0, (-1, self.settings.subcentres)).max(1)
        value_cN, slope_cN = (cosine_cN, None) if self.negatives is None else self.negatives(cosine_cN)
        e_cN = value_cN * self.settings.scale
        if self.shift:
            e_cN.sub_(self.shift)
        e_cN.exp_()
        self._set_targets(tile, e_cN, None)
        if tile.padded and tile.classes_c is not None:
            e_cN.masked_fill_((tile.classes_c >= self.size)[:, None], 0)
        return e_cN, slope_cN, best_cN

    def _set_targets(self, tile: Tile, e_cN: Tensor, value_N: Tensor | None) -> None:
        """Set each row's target, where it stands in this tile, to its value, or to 0."""
        last = tile.stop - tile.start - 1
        column_1N = (self.position_N - tile.start)[None]
        inside_1N = (column_1N >= 0) & (column_1N <= last)
        column_1N = column_1N.clamp(0, last)
        value_1N = 0 if value_N is None else value_N[None]
        e_cN.scatter_(0, column_1N, torch.where(inside_1N, value_1N, e_cN.gather(0, column_1N)))

    def by_row(self, e_cN: Tensor, best_cN: Tensor | None) -> Tensor:
        """(c, N) to (k, N): each value at the sub-centre whose cosine it is."""
        if best_cN is None:
            return e_cN
        c, N = e_cN.shape
        spread_cKN = e_cN.new_zeros(c, self.settings.subcentres, N)
        return spread_cKN.scatter_(1, best_cN[:, None], e_cN[:, None]).flatten(0, 1)

    def gradient(
        self, tile: Tile, cosine_kN: Tensor, inverse_k: Tensor, by_N: Tensor, at_target_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(g_kN, radial_k): the gradient of the tile's raw centres is g_kN @ x_ND - radial_k raw_kD.

        by_N: what the loss's gradient in a logit is over exp(), times the scale; at_target_N: the gradient in the
        target's cosine. The second term takes out what lies along the centre: lengths do not matter.
        """
        g_cN, slope_cN, best_cN = self.exponentials(tile, cosine_kN)
        g_cN.mul_(by_N)
        if slope_cN is not None:
            g_cN.mul_(slope_cN)
        self._set_targets(tile, g_cN, at_target_N)
        g_kN = self.by_row(g_cN, best_cN).mul_(inverse_k[:, None])
        # Multiplied by the inverse length once more, as cosines are of unit centres.
        return g_kN, (g_kN * cosine_kN).sum(1).mul_(inverse_k)
