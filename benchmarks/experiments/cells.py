"""Cells of the experiment: what is wrong with a training set. Same seed, same set, for every arm.

Legend: N samples, F numbers of a feature, I identities, M images of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.experiments.pools import Pool, normalised

_TRAINING, _VALIDATION, _TEST, _STRANGERS = 600, 100, 300, 200
_JUDGED = 12  # images of a held-out identity; all pairs are compared
_STEEPEST = 20.0  # images of the largest class for each of the smallest at a long tail of 1, as in data.synthetic


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Shares from 0 to 1."""

    noise: float = 0.0
    """Of the samples: they carry the label of another class of the set."""
    strangers: float = 0.0
    """Of the samples: they show somebody who is in no class."""
    tail: float = 0.0
    """0: all classes as large; above, sizes fall exponentially to a 20^-tail part."""
    fragments: float = 0.0
    """Of the identities: half of their samples stand under a second label of their own."""


CELLS = {
    "clean": Cell(),
    "noise": Cell(noise=0.2),
    "tail": Cell(tail=0.7),
    "noise tail": Cell(noise=0.2, tail=0.7),
    "fragments": Cell(fragments=0.2),
    "noise fragments": Cell(noise=0.2, fragments=0.2),
    "tail fragments": Cell(tail=0.7, fragments=0.2),
    "noise tail fragments": Cell(noise=0.2, tail=0.7, fragments=0.2),
    "strangers tail": Cell(strangers=0.2, tail=0.7),
}


@dataclass(frozen=True, slots=True)
class Split:
    """A training set and the held-out identities, all disjoint; x is features or images as the tier has them."""

    x: Tensor
    labels: Tensor
    """int64 (N,)."""
    wrong: npt.NDArray[np.bool_]
    """(N,): samples under a label that is not theirs."""
    num_classes: int
    validation: Tensor
    """Rows of held-out identities, _JUDGED of each in turn; settings are chosen by it."""
    test: Tensor
    """The same of others; read once, by the final runs."""


def make_split(pool: Pool, cell: Cell, *, seed: int, images: bool) -> Split:
    """Identities, sizes and faults are drawn by the seed."""
    rng = np.random.default_rng([seed, 5])
    persons = rng.permutation(len(pool.features))
    bounds = np.cumsum([_TRAINING, _VALIDATION, _TEST, _STRANGERS])
    training, validation, test, strangers = np.split(persons, bounds)[:4]
    place = rng.permutation(_TRAINING) / (_TRAINING - 1)
    M = pool.features.shape[1]
    sizes = np.maximum(1, np.rint(M * _STEEPEST ** (-cell.tail * place))).astype(np.int64)
    identity = np.repeat(np.arange(_TRAINING), sizes)
    image = np.concatenate([np.arange(size) for size in sizes])
    person, label, classes = training[identity], identity.copy(), _TRAINING
    for parted in rng.permutation(_TRAINING)[: round(cell.fragments * _TRAINING)]:
        own = rng.permutation(np.flatnonzero(identity == parted))
        if len(own) > 1:
            label[own[: len(own) // 2]] = classes
            classes += 1
    wrong = np.zeros(len(label), dtype=np.bool_)
    drawn = rng.permutation(len(label))
    misnamed = drawn[: round(cell.noise * len(label))]
    label[misnamed] = (label[misnamed] + rng.integers(1, classes, len(misnamed))) % classes
    unknown = drawn[len(misnamed) : len(misnamed) + round(cell.strangers * len(label))]
    person[unknown] = strangers[rng.integers(0, len(strangers), len(unknown))]
    image[unknown] = rng.integers(0, M, len(unknown))
    wrong[misnamed] = wrong[unknown] = True

    def rows(persons: npt.NDArray[np.int64], image: npt.NDArray[np.int64]) -> Tensor:
        if images:
            return normalised(pool.images[persons, image])
        return torch.from_numpy(pool.features[persons, image])

    judged = np.arange(_JUDGED)
    held_out = [rows(np.repeat(group, _JUDGED), np.tile(judged, len(group))) for group in (validation, test)]
    return Split(rows(person, image), torch.from_numpy(label), wrong, classes, *held_out)


def true_accept_rates(embeddings_ND: Tensor, fars: tuple[float, ...]) -> list[float]:
    """TAR in percent at each FAR, over all pairs of rows; unit embeddings, _JUDGED rows of each identity in turn."""
    N = len(embeddings_ND)
    first, second = torch.triu_indices(N, N, 1)
    cosines = (embeddings_ND @ embeddings_ND.T)[first, second]
    same = first // _JUDGED == second // _JUDGED
    impostors, genuine = cosines[~same], cosines[same]
    rates = []
    for far in fars:
        threshold = impostors.topk(max(1, round(far * len(impostors)))).values[-1]
        rates.append(100 * float((genuine > threshold).float().mean()))
    return rates
