"""The nearest centre of each point as `clustering.nearest.nearest` decides it, candidates found by products of small
codes.

A product of codes (`clustering.nearest.codes`) tells cosines up to an error that is known. Centres that may be the
nearest or the next are compared again, in float32 first and near ties in float64: the result is that of comparing
everything.

Legend: b points of a block, n of some rows of it, t centres of a tile, s centres, D embedding size, q pairs of a point
and a centre.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clustering.nearest.by_pairs import offer_, pair_cosines, pairs_where
from clustering.nearest.codes import CodedCentres, Codes
from clustering.nearest.nearest import NONE, Nearest, columns_of, hide_, nearest_

ROWS, COLUMNS = 1024, 1024
"""Of a tile: 4 MB of float32, for each thread."""
_CROWD = 32
"""With more candidates a point than these on average, a product in float32 is cheaper."""
_LEAST = torch.finfo(torch.float32).min
"""Below what can be a cosine over a step, above what does not count."""


Pairs = tuple[Tensor, Tensor, Tensor]
"""That may be a point's nearest or next: rows, columns, and cosines by codes."""


def nearest_by_codes_(
    state: Nearest, x_bD: Tensor, codes_b: Codes, centres_sD: Tensor, coded: CodedCentres, cluster_s: Tensor
) -> bool:
    """`nearest.nearest_` on CPUs. codes_b, coded: of the same points and centres, turned by the same Rotation.

    False where candidates were too many, and a product in float32 was made after all.
    """
    if not len(x_bD) or not len(centres_sD):
        return True
    error_b = coded.errors(codes_b)
    own_b = columns_of(state.index_b, cluster_s)
    first_b, next_b = state.best_b.float(), torch.full_like(error_b, NONE)
    found: list[Pairs] = []
    for top in range(0, len(x_bD), ROWS):
        rows = slice(top, top + ROWS)
        part = _candidates(codes_b[rows], coded, own_b[rows], error_b[rows], first_b[rows], next_b[rows])
        if part is None:
            nearest_(state, x_bD, centres_sD, centres_sD, cluster_s, kernels=False)
            return False
        found += [(row_q + top, column_q, cosine_q) for row_q, column_q, cosine_q in part]
    row_q, column_q, cosine_q = (torch.cat(parts) for parts in zip(*found, strict=True))
    may_q = cosine_q >= (next_b - error_b)[row_q]
    row_q, order_q = row_q[may_q].sort(stable=True)
    column_q = column_q[may_q][order_q]
    offer_(state, x_bD, row_q, centres_sD, column_q, pair_cosines(x_bD, row_q, centres_sD, column_q), cluster_s)
    return True


def _candidates(
    codes_n: Codes, coded: CodedCentres, own_n: Tensor, error_n: Tensor, first_n: Tensor, next_n: Tensor
) -> list[Pairs] | None:
    """All that may be by the first and the next of the tiles so far; None where they are too many.

    own_n: columns that do not count. first_n, next_n: what the nearest and the next cosine are at least; raised in
    place.
    """
    step_n = codes_n.step_b
    line_n = np.arange(len(step_n))
    found, pairs = [], 0
    for left, cosine_nt in coded.products(codes_n):
        hide_(cosine_nt, own_n - left)
        seen = cosine_nt.numpy()  # numpy looks through it in 0.1 to 0.3 ns a number, torch takes up to 5
        place_n = seen.argmax(axis=1)
        most_n = seen[line_n, place_n]
        seen[line_n, place_n] = NONE
        least_n, more_n = (torch.from_numpy(m_n) * step_n - error_n for m_n in (seen.max(axis=1), most_n))
        seen[line_n, place_n] = most_n
        torch.maximum(next_n, least_n.maximum(first_n.minimum(more_n)), out=next_n)
        torch.maximum(first_n, more_n, out=first_n)
        limit_n = ((next_n - error_n) / step_n).clamp_min_(_LEAST)
        row_q, column_q = pairs_where(seen >= limit_n[:, None].numpy())
        found.append((row_q, column_q + left, cosine_nt[row_q, column_q] * step_n[row_q]))
        pairs += len(row_q)
        if pairs > _CROWD * len(step_n):
            return None
    return found
