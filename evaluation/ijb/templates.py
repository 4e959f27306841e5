"""Templates of IJB: the images of one person, pooled by medium, then by template, to one unit vector.

A medium is a photograph or a video; the frames of one video must not outvote the photographs.
Legend: N images, T templates, D components of an embedding, b images of a block, r runs of images of one template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from evaluation.embed.files import EmbeddingFile, Ints, unit
from evaluation.roc import Floats


class Templates(NamedTuple):
    """ids_T: int64, rising. unit_TD: float64, rows of unit length."""

    ids_T: Ints
    unit_TD: Floats


def pooled(
    embeddings: EmbeddingFile,
    template_N: Ints,
    media_N: Ints,
    *,
    weight_N: Floats | None = None,
    unit_images: bool = False,
    progress: Callable[[int], None] = lambda images: None,
) -> Templates:
    """Templates of all images, as insightface pools them: t = sum over media of the mean of w x over a medium's images.

    t is scaled to length 1. x is the image's embedding, of its own length or, with unit_images, of unit length; w is
    weight_N (the detector's score), or 1. The mean is over the number of images, not the sum of weights. A medium
    counts once in each template that has images of it. As the mean is linear, t is one weighted sum, and the file is
    read once.

    Memory: 8 T D bytes beside a block. progress: called with the number of images that are done. Raises DataError for
    rows as `EmbeddingFile.block` does, and for templates whose sum is zero or not finite; ValueError for other shapes.
    """
    if not embeddings.rows == len(template_N) == len(media_N):
        raise ValueError(f"expected {embeddings.rows} templates and media, got {len(template_N)} and {len(media_N)}")
    ids_T, row_N = np.unique(template_N, return_inverse=True)
    share_N = _share_of_medium(row_N, media_N)
    if weight_N is not None:
        share_N *= weight_N
    sum_TD = np.zeros((len(ids_T), embeddings.dim))
    for start, rows_bD in embeddings.unit_blocks() if unit_images else embeddings.blocks():
        stop = start + len(rows_bD)
        x_bD, row_b = rows_bD * share_N[start:stop, None], row_N[start:stop]
        if (row_b[1:] < row_b[:-1]).any():  # the files of the field have their images by template
            order_b = np.argsort(row_b, kind="stable")
            x_bD, row_b = x_bD[order_b], row_b[order_b]
        first_r = np.flatnonzero(np.append(True, row_b[1:] != row_b[:-1]))
        sum_TD[row_b[first_r]] += np.add.reduceat(x_bD, first_r, axis=0)
        progress(stop - start)
    return Templates(ids_T, _unit_or_refuse(sum_TD, ids_T, embeddings))


def pooled_plainly(x_ND: Floats, template_N: Ints, media_N: Ints) -> Templates:
    """The same in loops, for tests. x_ND: float64, weighted already."""
    ids_T = np.unique(template_N)
    sums = []
    for template in ids_T:
        x_nD, media_n = x_ND[template_N == template], media_N[template_N == template]
        sums.append(np.sum([x_nD[media_n == medium].mean(axis=0) for medium in np.unique(media_n)], axis=0))
    sum_TD = np.stack(sums)
    return Templates(ids_T, sum_TD / np.linalg.norm(sum_TD, axis=1, keepdims=True))


def _share_of_medium(row_N: Ints, media_N: Ints) -> Floats:
    """1 / number of the images of an image's template that are of its medium."""
    order_N = np.lexsort((media_N, row_N))
    row, medium = row_N[order_N], media_N[order_N]
    first = np.append(True, (row[1:] != row[:-1]) | (medium[1:] != medium[:-1]))
    group = np.cumsum(first) - 1
    share_N = np.empty(len(row_N))
    share_N[order_N] = 1 / np.bincount(group)[group]
    return share_N


def _unit_or_refuse(sum_TD: Floats, ids_T: Ints, embeddings: EmbeddingFile) -> Floats:
    bad = np.flatnonzero(~(np.isfinite(sum_TD).all(axis=1) & sum_TD.any(axis=1)))
    if len(bad):
        raise DataError(
            f"{embeddings.path}: template {ids_T[bad[0]]}: expected a direction, its images sum to zero or beyond all "
            f"bounds ({len(bad)} templates in all): are all its detector scores zero?"
        )
    return unit(sum_TD)
