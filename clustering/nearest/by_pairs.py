"""Single pairs of a point and a centre, on CPUs: float32 first, float64 where it decides.

Legend: b points of a block, n of a tile, s centres, t of a tile, D embedding size, q pairs.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clustering.nearest.float64_rows import row_dots
from clustering.nearest.nearest import Nearest, tolerance


def quieten() -> None:
    """Take torch's only warning of sparse tensors in a process here, where nobody sees it: none leaves this module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair_cosines(
            torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
        )


def pairs_where(over: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true, rising, int64 (q,) both. numpy takes 0.3 ns a number, torch 5."""
    place_q = torch.from_numpy(np.flatnonzero(over))
    return place_q // over.shape[1], place_q % over.shape[1]


def pair_cosines(x_nD: Tensor, row_q: Tensor, centres_tD: Tensor, column_q: Tensor) -> Tensor:
    """Of single pairs, in float32. row_q: rising, and column_q within a row: nothing is gathered then."""
    shape = (len(x_nD), len(centres_tD))
    start_n = torch.bincount(row_q, minlength=shape[0]).cumsum(0)
    chosen = torch.sparse_csr_tensor(
        torch.cat([start_n.new_zeros(1), start_n]), column_q, x_nD.new_zeros(len(row_q)), shape, check_invariants=False
    )
    cosine_q: Tensor = torch.sparse.sampled_addmm(chosen, x_nD, centres_tD.T, beta=0.0).values()
    return cosine_q


def offer_(
    state: Nearest,
    x_bD: Tensor,
    row_q: Tensor,
    centres_sD: Tensor,
    column_q: Tensor,
    cosine_q: Tensor,
    cluster_s: Tensor,
) -> None:
    """Tell `state` of distinct pairs. cosine_q: float32; only those that may be the nearest need float64."""
    enough_b = state.best_b.float().scatter_reduce_(0, row_q, cosine_q, "amax") - 2 * tolerance(torch.float32)
    may_q = cosine_q >= enough_b[row_q]
    state.second_b.scatter_reduce_(0, row_q[~may_q], cosine_q[~may_q], "amax")
    row_q, column_q = row_q[may_q], column_q[may_q]
    state.offer_pairs_(row_q, cluster_s[column_q], row_dots(x_bD, row_q, centres_sD, column_q))
