"""Groups that stand for persons, and how much two of them look like one.

Legend: P samples with an embedding, sorted by (label, sample), D embedding size, G established groups, Q pairs of
groups, b rows of a block, k neighbours of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from clustering.neighbours import nearest_classes
from clustering.report_data import Bools, Doubles, Ints, Labelled
from clustering.report_groups import ESTABLISHED, PRIOR_PAIRS, Cut

_NEIGHBOURS = 8
"""Nearest groups that are looked at for the same person."""


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


def nearest_pairs(groups: Groups, group: dist.ProcessGroup) -> Same:
    """Each group with the nearest ones of other labels, each pair once, by (ratio descending, first, second).

    G^2 D multiplications. group: of one rank. Collectives: those of `nearest_classes`.
    """
    unit_GD = groups.sum_GD / np.linalg.norm(groups.sum_GD, axis=1, keepdims=True).clip(1e-30)
    G = len(unit_GD)
    count = max(0, min(_NEIGHBOURS, G - 1))
    table_Gk = nearest_classes(torch.from_numpy(unit_GD.astype(np.float32)), G, count, group).numpy().astype(np.int64)
    pair_Q2 = np.stack([np.repeat(np.arange(G), count), table_Gk.ravel()], axis=1)
    pair_Q2 = np.unique(np.sort(pair_Q2[pair_Q2[:, 1] >= 0], axis=1), axis=0)
    pair_Q2 = pair_Q2[groups.label_G[pair_Q2[:, 0]] != groups.label_G[pair_Q2[:, 1]]]
    ratio_Q = between(groups, pair_Q2[:, 0], pair_Q2[:, 1])
    order_Q = np.argsort(-ratio_Q, kind="stable")
    return Same(first_Q=pair_Q2[order_Q, 0], second_Q=pair_Q2[order_Q, 1], ratio_Q=ratio_Q[order_Q])


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
