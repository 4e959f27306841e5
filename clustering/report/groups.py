"""Groups of samples inside each label that belong together by their embeddings: the ground that the report stands on.

Two sets of samples belong together when the mean cosine of their pairs is at least `cut`. Inside a label, groups are
joined by that rule, the closest first (average linkage), until no two belong together. A person photographed in many
ways stays one group, as members of all kinds hold it together; another person's group, or a single wrong image, stays
apart. Training draws the persons under one label together, so that established groups are held to more: they must be
about as close to each other as they are in themselves (`group_labels`).

The cut is halfway between strangers (the mean cosine of all pairs across labels) and what is usual within a label
(the median over labels of the median pair; medians, so that wrong labels do not move it). Ours.

Legend: N samples, P samples with an embedding, sorted by (label, sample), D embedding size, C labels, n samples of a
label, G groups, T pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from clustering.job.together import InputError
from clustering.report.data import Doubles, Floats, Ints, Labelled

LARGEST = 1024
"""Samples of a label that are joined by linkage (4 MB of cosines); further ones go to the nearest of its groups."""
ESTABLISHED = 3
"""Members from which on a group says that there is a person: two images may be alike by accident."""
LEAST_RATIO = 0.8
"""Below this ratio two labels are not taken for one person, however far they stand out from others."""
PRIOR_PAIRS = 3.0
"""Pairs at the usual cosine that every group gets in addition to its own: its own few say little."""
SPLIT_FAR_OUT, DUPLICATE_FAR_OUT, NOISE_FAR_OUT = 4.0, 3.5, 3.5
"""Robust standard deviations from the median of the usual ones at which a finding begins."""
_ENOUGH = 30
_LEAST_GAP = 0.02
_PAIRS_DRAWN = 1 << 17
_USUAL_LABELS = 4096
"""Labels looked at for what is usual, spread over all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What counts as belonging together, and what it was decided from."""

    within: float
    """Usual cosine of two samples of a label."""
    across: float
    """Mean cosine of two samples of different labels."""
    stranger: float
    """Cosine that one pair in a hundred across labels exceeds."""

    @property
    def cosine(self) -> float:
        return (self.within + self.across) / 2

    @property
    def belonging(self) -> float:
        """The cut in parts of what is usual within a label."""
        return self.cosine / self.within

    @property
    def separates(self) -> bool:
        """Whether labels are closer than strangers at all; if not, nothing that is found means much."""
        return self.within > self.stranger


def decide_cut(data: Labelled) -> Cut:
    """From the data itself, the same each time. Raises InputError where nothing can be told."""
    sizes_C = np.diff(data.start_C)
    paired = np.flatnonzero(sizes_C > 1)
    if not len(paired) or np.count_nonzero(sizes_C) < 2:
        raise InputError(
            "labels: expected at least two labels with samples, one of them with two, found "
            f"{np.count_nonzero(sizes_C)} labels and {len(paired)} with two samples: there is nothing to compare"
        )
    chosen = paired[np.unique(np.linspace(0, len(paired) - 1, _USUAL_LABELS).astype(np.int64))]
    within = float(np.median([np.median(_pairs(_spread(data.x_PD[data.rows(y)], 64))) for y in chosen.tolist()]))
    rng = np.random.default_rng(0x637574)  # "cut"
    first_T, second_T = rng.integers(0, len(data.x_PD), (2, _PAIRS_DRAWN))
    different_T = data.label_P[first_T] != data.label_P[second_T]
    first_T, second_T = first_T[different_T], second_T[different_T]
    cos_T = np.concatenate(
        [
            np.einsum("td,td->t", data.x_PD[first_T[at : at + 8192]], data.x_PD[second_T[at : at + 8192]])
            for at in range(0, max(1, len(first_T)), 8192)
        ]
    )
    if not len(cos_T):  # nearly everything under one label
        raise InputError("labels: expected samples under several labels, found nearly all of them under one")
    across = float(cos_T.mean())
    if within - max(across, 0.0) < _LEAST_GAP:
        raise InputError(
            f"embeddings: expected samples of a label to be closer than others, got a usual cosine of {within:.3f} "
            f"within labels and {across:.3f} across: is row i of sample i, and has the network been trained?"
        )
    return Cut(within=within, across=across, stranger=float(np.quantile(cos_T, 0.99)))


def _spread(x_nD: Floats, most: int) -> Floats:
    return x_nD if len(x_nD) <= most else x_nD[np.linspace(0, len(x_nD) - 1, most).astype(np.int64)]


def _pairs(x_nD: Floats) -> Floats:
    """Cosines of all pairs."""
    cos_nn = x_nD @ x_nD.T
    return np.asarray(cos_nn[np.triu_indices(len(x_nD), 1)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """Groups of every label."""

    group_P: Ints
    """0 for the largest of the label, ties to the one of the first sample."""
    split: float
    """Ratio below which two established groups of a label are two persons."""


def group_labels(data: Labelled, cut: Cut) -> Grouped:
    """Groups of each label, by average linkage, and divided where two parts look like two persons.

    Average linkage up to `cut.cosine`. Each joint of two established groups has a ratio: the mean cosine across it
    over the geometric mean of those on its sides (`pooled`), 1 for one person. The lowest ratio of a label is usually
    near 1; `split` is SPLIT_FAR_OUT robust standard deviations below the median over the labels. Labels with a joint
    below that are grouped again, and there it is left open.

    n^2 D a label up to LARGEST samples.
    """
    group_P = np.zeros(len(data.x_PD), dtype=np.int64)
    weakest_C = np.full(data.num_labels, np.nan)
    for label in range(data.num_labels):
        rows = data.rows(label)
        if rows.stop - rows.start > 1:
            group_n, weakest_C[label] = _linked(data.x_PD[rows], cut)
            group_P[rows] = _by_size(group_n)
    known = weakest_C[np.isfinite(weakest_C)]
    split = far_out(known, -SPLIT_FAR_OUT, least=0.5, most=0.8, otherwise=0.6)
    for label in np.flatnonzero(weakest_C < split).tolist():
        rows = data.rows(label)
        group_P[rows] = _by_size(_divided(data.x_PD[rows], cut, split))
    return Grouped(group_P=group_P, split=split)


def far_out(values: Doubles, deviations: float, *, least: float, most: float, otherwise: float) -> float:
    """Median plus so many robust standard deviations (1.4826 MAD), within least … most; `otherwise` below 30 values."""
    if len(values) < _ENOUGH:
        return otherwise
    median = float(np.median(values))
    return min(max(median + deviations * 1.4826 * float(np.median(np.abs(values - median))), least), most)


def pooled(cosines: float, pairs: float, cut: Cut) -> float:
    """Mean cosine of a group's pairs, given their sum, with PRIOR_PAIRS usual ones added; at least 0.001."""
    return max((cosines + PRIOR_PAIRS * cut.within) / (pairs + PRIOR_PAIRS), 1e-3)


def _linked(x_nD: Floats, cut: Cut) -> tuple[Ints, float]:
    """Groups by average linkage, and the lowest ratio of a joint in them, NaN where none joins established groups."""
    if len(x_nD) > LARGEST:
        chosen = np.linspace(0, len(x_nD) - 1, LARGEST).astype(np.int64)
        group_c, weakest = _linked(x_nD[chosen], cut)
        return _joined_by(x_nD, chosen, group_c, cut), weakest
    tree = _tree(_pairs(x_nD))
    group_n = np.asarray(fcluster(tree, 1 - cut.cosine, "distance"), dtype=np.int64)
    size, cosines, weakest = [1] * len(x_nD), [0.0] * len(x_nD), math.nan
    for first, second, distance, joint in tree.tolist():
        if 1 - distance < cut.cosine:
            break
        one, other = int(first), int(second)
        across = (1 - distance) * size[one] * size[other]
        if min(size[one], size[other]) >= ESTABLISHED:
            own = (pooled(cosines[side], size[side] * (size[side] - 1) / 2, cut) for side in (one, other))
            weakest = np.fmin(weakest, (1 - distance) / math.sqrt(math.prod(own)))
        size.append(int(joint))
        cosines.append(cosines[one] + cosines[other] + across)
    return group_n, float(weakest)


def _divided(x_nD: Floats, cut: Cut, split: float) -> Ints:
    """Groups as by linkage, but established ones whose ratio is below `split` stay apart; what comes later joins the
    nearest of them."""
    if len(x_nD) > LARGEST:
        chosen = np.linspace(0, len(x_nD) - 1, LARGEST).astype(np.int64)
        return _joined_by(x_nD, chosen, _divided(x_nD[chosen], cut, split), cut)
    cos_nn = (x_nD @ x_nD.T).astype(np.float64)
    nodes: dict[int, list[list[int]]] = {row: [[row]] for row in range(len(x_nD))}

    def ratio(one: list[int], other: list[int]) -> float:
        if min(len(one), len(other)) < ESTABLISHED:
            return 1.0
        own = []
        for side in (one, other):
            among = cos_nn[np.ix_(side, side)]
            own.append(pooled(float(among.sum() - np.trace(among)) / 2, len(side) * (len(side) - 1) / 2, cut))
        return float(cos_nn[np.ix_(one, other)].mean()) / math.sqrt(own[0] * own[1])

    for number, (first, second, distance, _) in enumerate(_tree(_pairs(x_nD)).tolist(), start=len(x_nD)):
        if 1 - distance < cut.cosine:
            break
        parts, further = sorted((nodes.pop(int(first)), nodes.pop(int(second))), key=lambda node: -sum(map(len, node)))
        for part in further:
            closeness = [float(cos_nn[np.ix_(part, known)].mean()) for known in parts]
            nearest = int(np.argmax(closeness))
            if closeness[nearest] >= cut.cosine and ratio(part, parts[nearest]) >= split:
                parts[nearest] = parts[nearest] + part
            else:
                parts.append(part)
        nodes[number] = parts
    group_n = np.empty(len(x_nD), dtype=np.int64)
    for group, members in enumerate(part for parts in nodes.values() for part in parts):
        group_n[members] = group
    return group_n


def _tree(cos_T: Floats) -> Doubles:
    return np.asarray(linkage(np.clip(1 - cos_T.astype(np.float64), 0, 2), "average"))


def _joined_by(x_nD: Floats, chosen: Ints, group_c: Ints, cut: Cut) -> Ints:
    """Groups of all rows, given those of the chosen ones: each other row joins the nearest, or stands alone."""
    group_n = np.full(len(x_nD), -1)
    group_n[chosen] = _by_size(group_c)
    mean_GD = np.stack([x_nD[group_n == group].mean(0) for group in range(group_n.max() + 1)])
    rest = np.flatnonzero(group_n < 0)
    cos_rG = x_nD[rest] @ mean_GD.T
    nearest_r = cos_rG.argmax(1)
    alone_r = cos_rG[np.arange(len(rest)), nearest_r] < cut.cosine
    group_n[rest] = np.where(alone_r, len(mean_GD) + np.arange(len(rest)), nearest_r)
    return group_n


def _by_size(group_n: Ints) -> Ints:
    """Groups numbered anew: the largest is 0, of equals the one that comes first."""
    _, first_G, group_n, size_G = np.unique(group_n, return_index=True, return_inverse=True, return_counts=True)
    place_G = np.empty(len(size_G), dtype=np.int64)
    place_G[np.lexsort((first_G, -size_G))] = np.arange(len(size_G))
    return place_G[group_n.ravel()]
