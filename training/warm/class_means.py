"""Class centres made of images: for some classes the mean direction of the embeddings of some of their images.

Legend: N samples, n chosen ones, C classes, B batch, c classes in a batch, D components of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import Backbone
from data.rec.records import RecordSet
from evaluation.decoding import decoded
from evaluation.embed.embed import embed_images
from evaluation.embed.sources import RecordImages
from training.warm.class_map import Ints


class Embedded(NamedTuple):
    """What came of it."""

    images: int
    """That were embedded."""
    bad: int
    """That do not decode, or whose embedding is not finite: they count for nothing."""
    without: int
    """Classes that no image was left of: their centres are as they were."""


def chosen_samples(label_N: Ints, is_wanted_C: npt.NDArray[np.bool_], most: int) -> Ints:
    """At most so many samples of each wanted class, spread evenly over all of its samples: (n,), by class, then id."""
    samples = np.flatnonzero(is_wanted_C[label_N])
    order = np.argsort(label_N[samples], kind="stable")
    samples = samples[order]
    label_n = label_N[samples]
    first_n = np.searchsorted(label_n, label_n)
    place_n = np.arange(len(samples)) - first_n
    count_n = np.searchsorted(label_n, label_n, side="right") - first_n
    step_n = np.minimum(most, count_n)
    chosen_n: Ints = samples[(place_n * step_n) // count_n != ((place_n - 1) * step_n) // count_n]
    return chosen_n


@torch.no_grad()
def write_means(
    weight_CD: Tensor,
    records: RecordSet,
    backbone: Backbone,
    is_wanted_C: npt.NDArray[np.bool_],
    *,
    most: int,
    length: float,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None],
) -> Embedded:
    """Give wanted classes the mean of the unit embeddings of at most so many of their images, at that length.

    An embedding is the sum of those of the image and its mirror image, as in evaluation; the backbone runs in
    evaluation mode, on the device it is on. Sums are float64. weight_CD: on the CPU. progress: called with images that
    are done, and all of them. Raises DataError when a store does not give an image.
    """
    samples = chosen_samples(records.labels, is_wanted_C, most)
    has_centre_C = np.zeros(len(is_wanted_C), np.bool_)
    bad = done = 0

    def put(classes: Ints, sum_cD: Tensor) -> None:
        is_there_c = sum_cD.norm(dim=1) > 0
        kept = torch.from_numpy(classes)[is_there_c]
        weight_CD[kept] = (F.normalize(sum_cD[is_there_c]) * length).to(weight_CD.dtype)
        has_centre_C[kept.numpy()] = True

    last, last_sum_D = -1, torch.empty(0)
    batches = _batches(records, samples, batch_size)
    for batch in decoded(RecordImages(records).decode, batches, batch_size=batch_size, threads=threads):
        x_BD = torch.zeros(len(batch.samples), weight_CD.shape[1], dtype=torch.float64)
        good_b = np.flatnonzero(~batch.bad_B)
        if len(good_b):
            x_bD = embed_images(backbone, batch.pixels_BHW3[good_b], batch_size=batch_size).double().cpu()
            is_finite_b = x_bD.isfinite().all(dim=1)
            x_BD[good_b] = torch.where(is_finite_b[:, None], F.normalize(x_bD), 0)
            bad += int((~is_finite_b).sum())
        bad += len(batch.samples) - len(good_b)
        done += len(batch.samples)
        classes, place_B = np.unique(records.labels[batch.samples], return_inverse=True)
        sum_cD = torch.zeros(len(classes), x_BD.shape[1], dtype=torch.float64)
        sum_cD.index_add_(0, torch.from_numpy(place_B), x_BD)
        if last == classes[0]:
            sum_cD[0] += last_sum_D
        elif last >= 0:
            put(np.array([last]), last_sum_D[None])
        put(classes[:-1], sum_cD[:-1])
        last, last_sum_D = int(classes[-1]), sum_cD[-1]  # the next batch may begin with more of it
        progress(done, len(samples))
    if last >= 0:
        put(np.array([last]), last_sum_D[None])
    return Embedded(images=done - bad, bad=bad, without=int((is_wanted_C & ~has_centre_C).sum()))


def _batches(records: RecordSet, samples: Ints, batch_size: int) -> Iterator[list[int]]:
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        records.ahead(some)
        yield some.tolist()
