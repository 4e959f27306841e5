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

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clustering.nearest import Nearest, columns_of, row_dots, tolerance

_DEVIATIONS = 5.0
_ROUNDING = 4e-6
_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Of D, worth a try as d."""
_LEVELS = 1 << 11
"""Of a histogram of -1 … 1."""
_LIMITS = torch.arange(1, 39) / 40
"""Values of T worth a try."""
_ROWS, _COLUMNS = 2048, 512  # of a tile on a CPU
_PAIR_COST = 20.0
"""A pair compared alone over a cosine of a product of matrices, at D = 512, on a CPU core."""
_PASS_COST = 20.0
"""Multiplications in the time that looking at a cosine of the projections takes."""
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

    def limits(self, head_bd: Tensor) -> Tensor:
        """Of each point's products with the centres' projections, float32 (b,)."""
        return _limits(torch.tensor(self.cosine), head_bd.square().sum(1).clamp_max(1), self.dim) - _ROUNDING


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
    head_bd: Tensor,
    centres_sD: Tensor,
    head_sd: Tensor,
    cluster_s: Tensor,
    projection: Projection,
) -> int:
    """Compare each point, in full, with those centres of a tile whose cosine to it may be T or more; not its own.

    head_bd, head_sd: projections. Returns the number of pairs that were compared. CPUs only.
    """
    hidden_b, pairs = columns_of(state.index_b, cluster_s), 0
    limit_b1 = projection.limits(head_bd)[:, None].numpy()
    buffer = torch.empty(min(_ROWS, len(head_bd)) * min(_COLUMNS, len(head_sd)))
    over = np.empty(len(buffer), dtype=np.bool_)
    for top in range(0, len(head_bd), _ROWS):
        part_nd, limit_n1 = head_bd[top : top + _ROWS], limit_b1[top : top + _ROWS]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for left in range(0, len(head_sd), _COLUMNS):
            tile_td = head_sd[left : left + _COLUMNS]
            size = len(part_nd) * len(tile_td)
            head_nt = torch.mm(part_nd, tile_td.T, out=buffer[:size].view(len(part_nd), len(tile_td)))
            np.greater(head_nt.numpy(), limit_n1, out=over[:size].reshape(head_nt.shape))
            place_q = torch.from_numpy(np.flatnonzero(over[:size]))  # both 0.3 ns a number; torch takes 5
            if len(place_q):
                row_q, column_q = place_q // len(tile_td), place_q % len(tile_td)
                tile_tD, part_nD = centres_sD[left : left + _COLUMNS], x_bD[top : top + _ROWS]
                found.append((row_q + top, column_q + left, _cosines(part_nD, row_q, tile_tD, column_q)))
        if found:
            row_q, column_q, cosine_q = (torch.cat(parts) for parts in zip(*found, strict=True))
            pairs += len(row_q)
            other_q = hidden_b[row_q] != column_q
            _offer_(state, x_bD, row_q[other_q], centres_sD, column_q[other_q], cosine_q[other_q], cluster_s)
    return pairs


def quieten() -> None:
    """Take torch's only warning of sparse tensors in a process here, where nobody sees it: none leaves this module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _cosines(
            torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
        )


def _cosines(x_nD: Tensor, row_q: Tensor, centres_tD: Tensor, column_q: Tensor) -> Tensor:
    """Of single pairs, in float32. row_q: rising, and column_q within a row: nothing is gathered then."""
    shape = (len(x_nD), len(centres_tD))
    start_n = torch.bincount(row_q, minlength=shape[0]).cumsum(0)
    chosen = torch.sparse_csr_tensor(
        torch.cat([start_n.new_zeros(1), start_n]), column_q, x_nD.new_zeros(len(row_q)), shape, check_invariants=False
    )
    cosine_q: Tensor = torch.sparse.sampled_addmm(chosen, x_nD, centres_tD.T, beta=0.0).values()
    return cosine_q


def _offer_(
    state: Nearest,
    x_bD: Tensor,
    row_q: Tensor,
    centres_sD: Tensor,
    column_q: Tensor,
    cosine_q: Tensor,
    cluster_s: Tensor,
) -> None:
    """Only those pairs that may be the nearest need float64."""
    enough_b = state.best_b.float().scatter_reduce_(0, row_q, cosine_q, "amax") - 2 * tolerance(torch.float32)
    may_q = cosine_q >= enough_b[row_q]
    state.second_b.scatter_reduce_(0, row_q[~may_q], cosine_q[~may_q], "amax")
    row_q, column_q = row_q[may_q], column_q[may_q]
    state.offer_pairs_(row_q, cluster_s[column_q], row_dots(x_bD, row_q, centres_sD, column_q))


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


def choose(table: Tensor, dim: int, clusters: int, *, known: bool) -> Projection | None:
    """The projection of least predicted cost, if it is worth it.

    table: of `Sample`, over all ranks. known: every point's own cosine is known beforehand, so that points below T are
    not projected in vain.
    """
    widths = subspaces(dim)
    over_WG = table[: len(widths) * _LEVELS].view(-1, _LEVELS)
    points = int(table[-1])
    if not points or not clusters:
        return None
    solved_T = table[len(widths) * _LEVELS : -1] / points
    best, least = None, _WORTHWHILE
    for d, over_G in zip(widths, over_WG, strict=True):
        level_T = ((_limits(_LIMITS, torch.tensor(d / dim), dim) + 1) / 2 * _LEVELS).long().clamp(0, _LEVELS - 1)
        survive_T = over_G.flip(0).cumsum(0).flip(0)[level_T] / (points * clusters)
        projected_T = (d + _PASS_COST) / dim + survive_T * _PAIR_COST + d / clusters
        cost_T = (solved_T if known else 1) * projected_T + (1 - solved_T)
        number = int(cost_T.argmin())
        if float(cost_T[number]) < least:
            best, least = Projection(dims=d, cosine=float(_LIMITS[number]), dim=dim), float(cost_T[number])
    return best
