"""Finds what looks wrong with a labelled set, by its embeddings.

All rests on groups inside labels (`clustering.report.groups`) and on the method's own k-means, which sees no labels.

Legend: P samples with an embedding, sorted by (label, sample), D embedding size, C labels, G established groups, Q
pairs of groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch.distributed as dist

from clustering.report.clusters import Clusters, cluster
from clustering.report.copies import find_copies
from clustering.report.data import Doubles, Ints, Labelled
from clustering.report.findings import Copy, Duplicate, Findings, LabelState, Noise, Split
from clustering.report.groups import DUPLICATE_FAR_OUT, LEAST_RATIO, decide_cut, far_out, group_labels
from clustering.report.noise import find_noise, noise_from
from clustering.report.persons import Groups, between, established, nearest_pairs


def find_all(
    data: Labelled, group: dist.ProcessGroup, *, progress: Callable[[str], None] = lambda stage: None
) -> Findings:
    """All findings of a set, the same for the same input.

    group: of one rank. progress: called with the name of each stage as it begins. Time: N K D multiplications for each
    iteration of k-means, G^2 D for pairs of labels, n^2 D for each label of n samples; memory: 4 N D bytes for
    the embeddings and blocks beside them. Raises InputError when there is nothing to compare.
    """
    progress("groups inside labels")
    cut = decide_cut(data)
    grouped = group_labels(data, cut)
    groups = established(data, grouped.group_P, cut)
    progress("k-means")
    clusters = cluster(data, group, progress=lambda number, moved: progress(f"k-means: {moved:.2%} moved in {number}"))
    progress("pairs of labels")
    same = nearest_pairs(groups, group)
    best = same.best_G[groups.main_G]
    duplicate = far_out(best[np.isfinite(best)], DUPLICATE_FAR_OUT, least=0.0, most=0.75, otherwise=0.5)
    one_person = (same.contrast_Q >= duplicate) & (same.ratio_Q >= LEAST_RATIO)
    alike = np.stack([same.first_Q, same.second_Q], axis=1)[one_person]
    duplicates = _duplicates(groups, alike, same.contrast_Q[one_person], same.ratio_Q[one_person])
    splits = _splits(data, groups, alike, same.contrast_Q[one_person], grouped.split)
    progress("wrong labels")
    least = noise_from(data, groups, clusters, cut, alike)
    noise = find_noise(data, groups, clusters, cut, alike, least)
    progress("copies")
    wrong_P = np.isin(data.sample_P, [row.sample for row in noise])
    found = find_copies(data, clusters.index_P, wrong_P)
    copies = [
        Copy(float(cosine), *_named(data, int(place)), *_named(data, int(of)))
        for place, of, cosine in zip(*(found.place_T, found.of_T, found.cosine_T), strict=True)
    ]
    copies.sort(key=lambda row: (row.label == row.label_of, -row.score, row.copy_of, row.sample))
    return Findings(
        noise=noise,
        duplicates=duplicates,
        splits=splits,
        copies=copies,
        labels=_labels(data, groups, clusters, noise, copies),
        cut=cut,
        noise_from=least,
        split=grouped.split,
        duplicate=duplicate,
        iterations=clusters.iterations,
    )


def _named(data: Labelled, place: int) -> tuple[int, int]:
    return int(data.sample_P[place]), int(data.label_P[place])


def _duplicates(groups: Groups, alike: Ints, contrast: Doubles, ratios: Doubles) -> list[Duplicate]:
    rows = []
    for (first, second), score, ratio in zip(alike.tolist(), contrast.tolist(), ratios.tolist(), strict=True):
        if groups.main_G[first] and groups.main_G[second]:
            pair = sorted((int(groups.label_G[one]), int(groups.size_G[one])) for one in (first, second))
            (label, samples), (other_label, other_samples) = pair
            rows.append(Duplicate(score, label, other_label, ratio, samples, other_samples))
    return sorted(rows, key=lambda row: (-row.score, row.label, row.other_label))


def _splits(data: Labelled, groups: Groups, alike: Ints, contrast: Doubles, split: float) -> list[Split]:
    minor = np.flatnonzero(~groups.main_G)
    main_C = np.full(data.num_labels, -1)
    main_C[groups.label_G[groups.main_G]] = np.flatnonzero(groups.main_G)
    main = main_C[groups.label_G[minor]]
    looks_like: dict[int, tuple[float, int]] = {}
    for pair, score in zip(alike.tolist(), contrast.tolist(), strict=True):
        for one, other in (pair, pair[::-1]):
            label = int(groups.label_G[other])
            if groups.main_G[other] and (score, -label) > looks_like.get(one, (0.0, 0)):
                looks_like[one] = (score, -label)
    places = np.argsort(groups.of_P, kind="stable")
    start = np.searchsorted(groups.of_P[places], np.arange(len(groups.size_G) + 1))
    rows = []
    for number, largest, ratio_of in zip(minor.tolist(), main.tolist(), between(groups, minor, main), strict=True):
        if ratio_of >= split:
            continue
        members = data.sample_P[places[start[number] : start[number + 1]]]
        label = int(groups.label_G[number])
        like = -looks_like[number][1] if number in looks_like else -1
        samples = tuple(sorted(members.tolist()))
        rows.append(Split(1 - float(ratio_of), label, number - largest, like, samples, int(groups.size_G[largest])))
    return sorted(rows, key=lambda row: (-row.score, row.label, row.group))


def _labels(
    data: Labelled, groups: Groups, clusters: Clusters, noise: list[Noise], copies: list[Copy]
) -> list[LabelState]:
    def per_label(labels: list[int]) -> list[int]:
        return list(np.bincount(np.array(labels, dtype=np.int64), minlength=data.num_labels).tolist())

    suspects = per_label([row.label for row in noise])
    copied = per_label([row.label for row in copies])
    persons = per_label(groups.label_G.tolist())
    rows = [
        LabelState(
            label,
            int(data.start_C[label + 1] - data.start_C[label]),
            float(clusters.hard_C[label]),
            float(clusters.agreement_C[label]),
            float(clusters.cohesion_C[label]),
            suspects[label],
            persons[label],
            copied[label],
        )
        for label in range(data.num_labels)
    ]
    return sorted(rows, key=lambda row: (-row.hard_level, row.label))
