"""Groups that stand for persons, and how much two of them look like one.

Legend: P samples with an embedding, sorted by (label, sample), D embedding size, G established groups, Q pairs of
groups, b rows of a block, k neighbours of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from clustering.method.neighbours import nearest_classes
from clustering.report.data import Bools, Doubles, Ints, Labelled
from clustering.report.groups import ESTABLISHED, PRIOR_PAIRS, Cut

_NEIGHBOURS = 12
"""Nearest groups that are looked at for the same person; some may be of the same label."""
_AROUND = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Established groups: those large enough to stand for a person."""

    label_G: Ints
    size_G: Ints
    main_G: Bools
    """The largest group of its label."""
    sum_GD: Doubles
    rho_G: Doubles
    """Mean cosine of its pairs, with PRIOR_PAIRS usual ones added."""
    of_P: Ints
    """Each sample's group, -1 for none."""


def established(data: Labelled, group_P: Ints, cut: Cut) -> Groups:
    """Groups of at least ESTABLISHED samples, and the largest group of a label from two on; by (label, group)."""
    key_P = data.label_P * (1 + group_P.max()) + group_P
    keys, index_P, size = np.unique(key_P, return_inverse=True, return_counts=True)
    label, group = np.divmod(keys, 1 + group_P.max())
    kept = (size >= ESTABLISHED) | ((group == 0) & (size >= 2))
    number = np.where(kept, np.cumsum(kept) - 1, -1)
    of_P = number[index_P.ravel()]
    size_G, label_G = size[kept], label[kept]
    sum_GD = np.zeros((len(size_G), data.x_PD.shape[1]))
    squares_G = np.zeros(len(size_G))
    inside = np.flatnonzero(of_P >= 0)
    for start in range(0, len(inside), 65536):
        rows = inside[start : start + 65536]
        x_bD = data.x_PD[rows].astype(np.float64)
        np.add.at(sum_GD, of_P[rows], x_bD)
        np.add.at(squares_G, of_P[rows], np.einsum("bd,bd->b", x_bD, x_bD))
    pairs_G = size_G * (size_G - 1) / 2
    cosines_G = (np.einsum("gd,gd->g", sum_GD, sum_GD) - squares_G) / 2
    rho_G = (cosines_G + PRIOR_PAIRS * cut.within) / (pairs_G + PRIOR_PAIRS)
    return Groups(
        label_G=label_G,
        size_G=size_G,
        main_G=group[kept] == 0,
        sum_GD=sum_GD,
        rho_G=np.maximum(rho_G, 1e-3),
        of_P=of_P,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Same:
    """Pairs of groups of different labels, the nearest first: how much they look like one person."""

    first_Q: Ints
    second_Q: Ints
    ratio_Q: Doubles
    """Mean cosine between them over the geometric mean of their own: 1 for one person, whatever the sizes."""
    contrast_Q: Doubles
    """That ratio less half of what is usual around them: the mean ratio of each to its next _AROUND neighbours."""
    best_G: Doubles
    """Of each group the contrast to its nearest neighbour by its own surroundings alone; NaN without neighbours."""


def nearest_pairs(groups: Groups, group: dist.ProcessGroup) -> Same:
    """Each group with the nearest ones of other labels, each pair once, by (contrast descending, first, second).

    Look-alikes come in crowds, a second label of the same person stands out from them: hence the contrast.
    G^2 D multiplications. group: of one rank. Collectives: those of `nearest_classes`.
    """
    unit_GD = groups.sum_GD / np.linalg.norm(groups.sum_GD, axis=1, keepdims=True).clip(1e-30)
    G = len(unit_GD)
    count = max(0, min(_NEIGHBOURS, G - 1))
    table_Gk = nearest_classes(torch.from_numpy(unit_GD.astype(np.float32)), G, count, group).numpy().astype(np.int64)
    own_Gk = np.broadcast_to(np.arange(G)[:, None], table_Gk.shape)
    foreign_Gk = (table_Gk >= 0) & (groups.label_G[own_Gk] != groups.label_G[table_Gk])
    ratio_Gk = between(groups, own_Gk.ravel(), table_Gk.ravel()).reshape(table_Gk.shape)
    ratio_Gk = np.where(foreign_Gk, ratio_Gk, -np.inf)
    order_Gk = np.argsort(-ratio_Gk, axis=1, kind="stable")
    table_Gk, ratio_Gk = np.take_along_axis(table_Gk, order_Gk, 1), np.take_along_axis(ratio_Gk, order_Gk, 1)
    foreign_Gk = np.isfinite(ratio_Gk)

    first_Q = np.repeat(np.arange(G), count)[foreign_Gk.ravel()]
    pair_Q2 = np.stack([first_Q, table_Gk[foreign_Gk]], axis=1)
    pair_Q2 = np.unique(np.sort(pair_Q2, axis=1), axis=0)
    first_Q, second_Q = pair_Q2[:, 0], pair_Q2[:, 1]
    ratio_Q = between(groups, first_Q, second_Q)
    around_Q = _around(table_Gk, ratio_Gk, first_Q, second_Q) + _around(table_Gk, ratio_Gk, second_Q, first_Q)
    contrast_Q = ratio_Q - around_Q / 4
    order_Q = np.argsort(-contrast_Q, kind="stable")
    best_G = np.full(G, np.nan)
    if count:
        has = np.flatnonzero(foreign_Gk[:, 0])
        best_G[has] = ratio_Gk[has, 0] - _around(table_Gk, ratio_Gk, has, table_Gk[has, 0]) / 2
    return Same(
        first_Q=first_Q[order_Q],
        second_Q=second_Q[order_Q],
        ratio_Q=ratio_Q[order_Q],
        contrast_Q=contrast_Q[order_Q],
        best_G=best_G,
    )


def _around(table_Gk: Ints, ratio_Gk: Doubles, group_Q: Ints, but_Q: Ints) -> Doubles:
    """Mean ratio of a group to its nearest _AROUND neighbours but one, float64 (Q,); 0 where there are none."""
    counts_Qk = np.isfinite(ratio_Gk[group_Q]) & (table_Gk[group_Q] != but_Q[:, None])
    counts_Qk &= np.cumsum(counts_Qk, axis=1) <= _AROUND
    sum_Q = np.where(counts_Qk, ratio_Gk[group_Q], 0.0).sum(1)
    return np.asarray(sum_Q / np.maximum(counts_Qk.sum(1), 1))


def between(groups: Groups, first_Q: Ints, second_Q: Ints) -> Doubles:
    """Mean cosine between two groups over the geometric mean of their own, float64 (Q,)."""
    dots_Q = np.concatenate(
        [
            np.einsum("qd,qd->q", groups.sum_GD[first_Q[at : at + 8192]], groups.sum_GD[second_Q[at : at + 8192]])
            for at in range(0, max(1, len(first_Q)), 8192)
        ]
    )
    cosine_Q = dots_Q / (groups.size_G[first_Q] * groups.size_G[second_Q])
    return np.asarray(cosine_Q / np.sqrt(groups.rho_G[first_Q] * groups.rho_G[second_Q]))
