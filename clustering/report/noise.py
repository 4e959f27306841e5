"""Samples whose label is probably wrong.

Closeness of a sample and a person's group: mean cosine to its (other) members over the geometric mean of the group's
own and the usual cosine, so 1 is as close as members are; `Cut.belonging` is where one begins to belong.

Legend: P samples with an embedding, sorted by (label, sample), D embedding size, C labels, G established groups, Q
pairs of groups, S candidates, b rows of a block.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from clustering.report.clusters import Clusters
from clustering.report.data import Doubles, Ints, Labelled
from clustering.report.findings import Noise
from clustering.report.groups import NOISE_FAR_OUT, Cut, far_out
from clustering.report.persons import Groups

_USUAL = 8192
"""Samples that nothing speaks against, from which the usual scores are taken."""
_NOBODY = -1000.0
"""Closeness where there is nobody to be close to: below every other."""
_TILE = 1 << 22
"""Numbers of a block of closenesses: 32 MB."""


def find_noise(data: Labelled, groups: Groups, clusters: Clusters, cut: Cut, alike: Ints, least: float) -> list[Noise]:
    """Samples outside the groups of their label, or suspect to the gate of k-means, with a score above `least`; by
    score.

    alike: (Q, 2), groups of different labels that are one person. Labels of one sample have no wrong ones, and labels
    less than half of whose samples are in groups none that look like nobody.
    """
    place_S = np.flatnonzero((groups.of_P < 0) | clusters.suspect_P)
    place_S = place_S[np.diff(data.start_C)[data.label_P[place_S]] > 1]  # a single image has nothing to differ from
    belonging = cut.belonging
    own_S, other_S, like_S = _closeness(data, groups, cut, place_S, _foes(data, groups, alike))
    grouped_C = np.bincount(data.label_P[groups.of_P >= 0], minlength=data.num_labels)
    clear_C = 2 * grouped_C >= np.diff(data.start_C)  # of a label that is all scattered, nobody knows who is meant
    rows = []
    columns = (place_S.tolist(), own_S.tolist(), other_S.tolist(), like_S.tolist())
    for place, own, other, like in zip(*columns, strict=True):
        closed = other >= belonging
        score = max(other, belonging) - own
        sample, label = int(data.sample_P[place]), int(data.label_P[place])
        if score > least and (closed or clear_C[label]):
            kind: Literal["closed", "open"] = "closed" if closed else "open"
            suspect = bool(clusters.suspect_P[place])
            rows.append(Noise(score, sample, label, kind, like if closed else -1, own, other, suspect))
    return sorted(rows, key=lambda row: (-row.score, row.sample))


def noise_from(data: Labelled, groups: Groups, clusters: Clusters, cut: Cut, alike: Ints) -> float:
    """Score above which a sample counts as wrong: NOISE_FAR_OUT robust standard deviations above the median of samples
    that nothing speaks against, of some thousands of them spread over all; 0 at least."""
    place_S = np.flatnonzero((groups.of_P >= 0) & ~clusters.suspect_P)
    place_S = place_S[np.unique(np.linspace(0, len(place_S) - 1, _USUAL).astype(np.int64))] if len(place_S) else place_S
    own_S, other_S, _ = _closeness(data, groups, cut, place_S, _foes(data, groups, alike))
    scores_S = np.maximum(other_S, cut.belonging) - own_S
    return far_out(scores_S, NOISE_FAR_OUT, least=0.0, most=1.0, otherwise=0.0)


def _foes(data: Labelled, groups: Groups, alike: Ints) -> dict[int, set[int]]:
    """For each label the groups that may not testify against it: its own, and those of the same person elsewhere."""
    foes: dict[int, set[int]] = {}
    for first, second in alike.tolist():
        for one, other in ((first, second), (second, first)):
            foes.setdefault(int(groups.label_G[one]), set()).add(other)
    return foes


def _closeness(
    data: Labelled, groups: Groups, cut: Cut, place_S: Ints, apart: dict[int, set[int]]
) -> tuple[Doubles, Doubles, Ints]:
    """Closeness to the nearest group of the own label and of another, and that label; (S,) each."""
    own_S, other_S = np.empty(len(place_S)), np.full(len(place_S), _NOBODY)
    like_S = np.full(len(place_S), -1)
    G = len(groups.size_G)
    scale_G = 1 / (groups.size_G * np.sqrt(groups.rho_G * cut.within))
    sum_GD = groups.sum_GD.astype(np.float32)
    first_C = np.searchsorted(groups.label_G, np.arange(data.num_labels + 1))
    for start in range(0, len(place_S), max(1, _TILE // max(1, G))):
        place_b = place_S[start : start + max(1, _TILE // max(1, G))]
        x_bD = data.x_PD[place_b]
        close_bG = (x_bD @ sum_GD.T).astype(np.float64) * scale_G
        for row, place in enumerate(place_b.tolist()):
            label = int(data.label_P[place])
            mine = slice(first_C[label], first_C[label + 1])
            in_group = int(groups.of_P[place])
            if in_group >= 0:  # without itself
                size = groups.size_G[in_group]
                itself = scale_G[in_group] * float(x_bD[row] @ x_bD[row])
                close_bG[row, in_group] = (close_bG[row, in_group] - itself) * size / (size - 1)
            if mine.stop > mine.start:
                own_S[start + row] = close_bG[row, mine].max()
            else:
                own_S[start + row] = _among_own(data, place) / cut.within
            close_bG[row, mine] = _NOBODY
            close_bG[row, list(apart.get(label, ()))] = _NOBODY
        if G:
            best_b = close_bG.argmax(1)
            other_S[start : start + len(place_b)] = close_bG[np.arange(len(place_b)), best_b]
            like_S[start : start + len(place_b)] = groups.label_G[best_b]
    return own_S, other_S, like_S


def _among_own(data: Labelled, place: int) -> float:
    """Mean cosine to the other samples of the label, for a label without a group."""
    rows = data.rows(int(data.label_P[place]))
    cosines = data.x_PD[rows] @ data.x_PD[place]
    return float((cosines.sum() - cosines[place - rows.start]) / (len(cosines) - 1))
