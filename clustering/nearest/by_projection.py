"""Centres that cannot be a point's nearest, told from a projection to fewer dimensions. Ours.

Let P project on a random subspace of d of the D dimensions, x and c be unit vectors with cosine s, and p = |P x|^2.
Then P x = p x + sqrt(p (1 - p)) v, where v is orthogonal to x and otherwise of any direction alike; hence

    h = P x . P c = s p + sqrt(p (1 - p) (1 - s^2)) w

w is one coordinate of a random unit vector in D - 1 dimensions: it has the variance 1 / (D - 1), and tails below those
of the normal distribution. So if s is T or more, h is at least

    T p - 5 sqrt(p (1 - p) (1 - T^2) / (D - 1))

but for one pair in 3 million. Of the products of d columns only the pairs above that limit are compared in full. Where
the best cosine found is T or more, it is the best of all, and no centre but those found has a cosine above T. Other
points are compared with all centres.

d and T are chosen from the cosines of a sample of points, so that the predicted cost is least; without structure in the
data, nothing is gained and nothing is projected. ADSampling (arXiv 2303.09855) tests prefixes of rotated vectors in the
same spirit, one pair after the other; here one limit serves all pairs, and the products are those of matrices.

Legend: b points of a block, s centres of a tile, D embedding size, d dimensions of the subspace, E of the widest,
q pairs of a point and a centre, Q points of the sample, K clusters, G levels of a histogram, T limits worth a try.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clustering.nearest.by_pairs import offer_, pair_cosines, pairs_where
from clustering.nearest.nearest import Nearest, columns_of
from clustering.nearest.projected import ProjectedCentres, ProjectedPoints

_DEVIATIONS = 5.0
_ROUNDING = 4e-6
_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Of D, worth a try as d."""
_LEVELS = 1 << 11
"""Of a histogram of -1 … 1."""
_LIMITS = torch.arange(1, 39) / 40
"""Values of T worth a try."""
_ROWS = 1024  # of a tile on a CPU
_PAIR_COST = 20.0
"""A pair compared alone over a cosine of a product of matrices, at D = 512, on a CPU core."""
_PASS_COST = 20.0
"""Multiplications in the time that looking at a cosine of the projections takes."""
_CODES_PRODUCT, _CODES_FULL = 0.5, 0.65
"""Costs of a product of codes, and of comparing by codes with all that belongs to it, over those in float32."""
_WORTHWHILE = 0.85
"""Of the cost of comparing everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Which subspace, and which cosines are found."""

    dims: int
    """d."""
    cosine: float
    """T: pairs with a cosine this large are found."""
    dim: int
    """D."""

    def limits(self, kept_b: Tensor) -> Tensor:
        """Of each point's products with the centres' projections, float32 (b,). kept_b: p."""
        return _limits(torch.tensor(self.cosine), kept_b, self.dim) - _ROUNDING


def _limits(cosine: Tensor, kept: Tensor, dim: int) -> Tensor:
    limit: Tensor = cosine * kept - _DEVIATIONS * (kept * (1 - kept) * (1 - cosine**2) / (dim - 1)).sqrt()
    return limit


def subspaces(dim: int) -> list[int]:
    """Values of d worth a try, rising; empty where D is too small for any."""
    return sorted({int(dim * share) // 8 * 8 for share in _SHARES} - {0}) if dim >= 64 else []


def random_basis(dim: int, seed: int = 0) -> Tensor:
    """Columns of a random orthonormal basis, float32 (D, E), on the CPU: the first d of them span a random subspace."""
    widths = subspaces(dim)
    generator = torch.Generator().manual_seed(seed)
    gauss_DE = torch.randn(dim, max(widths, default=0), dtype=torch.float64, generator=generator)
    basis_DE: Tensor = torch.linalg.qr(gauss_DE).Q.float()
    return basis_DE


def find_(
    state: Nearest,
    x_bD: Tensor,
    points_b: ProjectedPoints,
    centres_sD: Tensor,
    projected_s: ProjectedCentres,
    cluster_s: Tensor,
    projection: Projection,
) -> int:
    """Compare each point, in full, with those centres of a tile whose cosine to it may be T or more; not its own.

    points_b, projected_s: their projections. Returns the number of pairs that were compared. CPUs only.
    """
    own_b, pairs = columns_of(state.index_b, cluster_s), 0
    unit_b, error_b = projected_s.unit(points_b)
    limit_b1 = ((projection.limits(points_b.kept_b) - error_b) * unit_b)[:, None].numpy()
    for top in range(0, len(x_bD), _ROWS):
        rows, found = slice(top, top + _ROWS), []
        for left, head_nt in projected_s.tiles(points_b[rows]):
            row_q, column_q = pairs_where(head_nt.numpy() > limit_b1[rows])
            if len(row_q):
                tile_tD = centres_sD[left : left + head_nt.shape[1]]
                found.append((row_q + top, column_q + left, pair_cosines(x_bD[rows], row_q, tile_tD, column_q)))
        if found:
            row_q, column_q, cosine_q = (torch.cat(parts) for parts in zip(*found, strict=True))
            pairs += len(row_q)
            other_q = own_b[row_q] != column_q
            offer_(state, x_bD, row_q[other_q], centres_sD, column_q[other_q], cosine_q[other_q], cluster_s)
    return pairs


class Sample:
    """What a sample of points says of d and T. Counts are over this rank's part; `table_` is summed over the ranks."""

    def __init__(self, x_QD: Tensor, basis_DE: Tensor) -> None:
        """x_QD: float32 unit rows."""
        self.widths = subspaces(x_QD.shape[1])
        self._x_QD, self._basis_DE, self._head_QE = x_QD, basis_DE, x_QD @ basis_DE
        self._best_Q = torch.full((len(x_QD),), -1.0)
        self._over_WG = torch.zeros(len(self.widths), _LEVELS, dtype=torch.int64)

    def see(self, centres_sD: Tensor) -> None:
        """Compare with a tile's centres, none of them zero."""
        if not len(self._x_QD) or not len(centres_sD):
            return
        self._best_Q = self._best_Q.maximum((self._x_QD @ centres_sD.T).amax(1))
        head_sE = centres_sD @ self._basis_DE
        for number, d in enumerate(self.widths):
            head_Qs = self._head_QE[:, :d] @ head_sE[:, :d].T
            level_Qs = head_Qs.add_(1).mul_(_LEVELS / 2).long().clamp_(0, _LEVELS - 1)
            self._over_WG[number] += torch.bincount(
                level_Qs.flatten(), minlength=_LEVELS
            )  # histc takes 5 times as long

    def table(self) -> Tensor:
        """int64 counts, to be summed over the ranks: pairs by level for each d, points by best cosine, points."""
        solved_T = (self._best_Q[:, None] >= _LIMITS).sum(0)
        return torch.cat([self._over_WG.flatten(), solved_T, torch.tensor([len(self._x_QD)])])


def choose(table: Tensor, dim: int, clusters: int, *, known: bool, codes: bool) -> Projection | None:
    """The projection of least predicted cost, if it is worth it.

    table: of `Sample`, over all ranks. known: every point's own cosine is known beforehand, so that points below T are
    not projected in vain. codes: products are those of codes.
    """
    widths = subspaces(dim)
    over_WG = table[: len(widths) * _LEVELS].view(-1, _LEVELS)
    points = int(table[-1])
    if not points or not clusters:
        return None
    solved_T = table[len(widths) * _LEVELS : -1] / points
    product, full = (_CODES_PRODUCT, _CODES_FULL) if codes else (1.0, 1.0)
    best, least = None, _WORTHWHILE * full
    for d, over_G in zip(widths, over_WG, strict=True):
        level_T = ((_limits(_LIMITS, torch.tensor(d / dim), dim) + 1) / 2 * _LEVELS).long().clamp(0, _LEVELS - 1)
        survive_T = over_G.flip(0).cumsum(0).flip(0)[level_T] / (points * clusters)
        projected_T = (d * product + _PASS_COST) / dim + survive_T * _PAIR_COST + d / clusters
        cost_T = (solved_T if known else 1) * projected_T + (1 - solved_T) * full
        number = int(cost_T.argmin())
        if float(cost_T[number]) < least:
            best, least = Projection(dims=d, cosine=float(_LIMITS[number]), dim=dim), float(cost_T[number])
    return best
