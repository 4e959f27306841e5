"""IJB-B and IJB-C from templates: 1:1 verification over all pairs, 1:N identification in galleries.

Legend: T templates, P pairs, Q probes, G gallery entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from evaluation.identification import FPIRS, RANKS, Identification, best_scores, cosines, identification
from evaluation.ijb.files import Pairs, Persons
from evaluation.ijb.pair_scores import pair_scores
from evaluation.ijb.templates import Templates
from evaluation.roc import Roc, TarAtFar, nearest_tars, roc_of, tar_at_far

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class OneToOne(NamedTuple):
    """roc: of all pairs. tar_at_far: the best TAR of thresholds whose FAR is at most the rate. nearest: TAR at the
    ROC's point whose FAR is nearest to the rate, below or above, as insightface reports it. In the order of the rates.
    """

    roc: Roc
    tar_at_far: tuple[TarAtFar, ...]
    nearest: tuple[float, ...]


def one_to_one(templates: Templates, pairs: Pairs, *, fars: Sequence[float] = FARS) -> OneToOne:
    """Score all pairs in float64. O(P log P). Raises ValueError for pairs of one kind only."""
    roc = roc_of(pair_scores(templates.unit_TD, pairs.first_P, pairs.second_P), pairs.same_P)
    return OneToOne(roc, tuple(tar_at_far(roc, far) for far in fars), nearest_tars(roc, fars))


def one_to_many(
    templates: Templates,
    gallery: Persons,
    probes: Persons,
    *,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> Identification:
    """Search every probe in a gallery: closed set over probes whose subject is in it, open set with the others.

    Raises DataError for a subject with two templates in the gallery, a template that is in the gallery and a probe, and
    probes none of whom is in the gallery.
    """
    _refuse(gallery, probes, templates)
    order_G = np.argsort(gallery.subject_G)
    place_Q = np.minimum(np.searchsorted(gallery.subject_G[order_G], probes.subject_G), len(order_G) - 1)
    mate_Q = order_G[place_Q]
    mated_Q = gallery.subject_G[mate_Q] == probes.subject_G
    if not mated_Q.any():
        raise DataError(
            f"{probes.path}: expected some subject of {gallery.path}, found none: do the files belong together?"
        )
    probe_QD, gallery_GD = templates.unit_TD[probes.row_G], templates.unit_TD[gallery.row_G]
    others_QK = best_scores(probe_QD, [(0, gallery_GD)], max(ranks), leave_out_Q=np.where(mated_Q, mate_Q, -1))
    mated = np.flatnonzero(mated_Q)
    mates = cosines(probe_QD[mated], gallery_GD[mate_Q[mated]])
    return identification(mates, others_QK, mated, others_QK[~mated_Q, 0], ranks=ranks, fpirs=fpirs)


def joined(galleries: Sequence[Persons]) -> Persons:
    """One gallery of several."""
    return Persons(
        Path(" + ".join(str(gallery.path) for gallery in galleries)),
        np.concatenate([gallery.row_G for gallery in galleries]),
        np.concatenate([gallery.subject_G for gallery in galleries]),
    )


def _refuse(gallery: Persons, probes: Persons, templates: Templates) -> None:
    subjects, counts = np.unique(gallery.subject_G, return_counts=True)
    if (counts > 1).any():
        subject = subjects[np.argmax(counts > 1)]
        two = templates.ids_T[gallery.row_G[gallery.subject_G == subject]][:2]
        raise DataError(
            f"{gallery.path}: subject {subject}: expected one template, found {two[0]} and {two[1]}: keep one of them"
        )
    both = np.intersect1d(gallery.row_G, probes.row_G)
    if len(both):
        raise DataError(
            f"{probes.path}: template {templates.ids_T[both[0]]} is a probe, and in {gallery.path}: it would find "
            "itself"
        )
