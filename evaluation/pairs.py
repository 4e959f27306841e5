"""Verification sets whose pairs can be evaluated, and the embeddings of their pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from backbones import Backbone
from data.errors import DataError
from data.verification_bin import VerificationSet, read_bin
from evaluation.embed.embed import Images, embed_images
from evaluation.verification import FOLDS


def read_pairs(path: Path) -> VerificationSet:
    """A .bin whose pairs can be evaluated. Raises DataError for one that cannot be read, has fewer pairs than
    `verification.FOLDS`, or pairs of one kind only.
    """
    pairs = read_bin(path)
    alike = int(pairs.same.sum())
    if len(pairs.same) < FOLDS or not 0 < alike < len(pairs.same):
        raise DataError(
            f"{path}: expected at least {FOLDS} pairs, of one person and of two, got {len(pairs.same)} pairs, {alike} "
            "of one person: make the set anew with more pairs"
        )
    return pairs


class PairEmbeddings(NamedTuple):
    """first_PD, second_PD: float32, not of unit length. same_P: bool, whether the pair shows one person."""

    first_PD: npt.NDArray[np.float32]
    second_PD: npt.NDArray[np.float32]
    same_P: npt.NDArray[np.bool_]


def embed_pairs(
    backbone: Backbone,
    images: Images,
    same_P: npt.NDArray[np.bool_],
    *,
    batch_size: int,
    group: dist.ProcessGroup | None = None,
    each: Callable[[], None] | None = None,
) -> PairEmbeddings:
    """Embed 2P images, of which 2i and 2i + 1 are pair i; what `data.verification_bin.read_bin` returns.

    `evaluation.verification.verify(*pairs)` compares them. For the rest, the collective and the errors see
    `embed_images`; ValueError also when there are not two images a pair.
    """
    if same_P.ndim != 1 or len(images) != 2 * len(same_P):
        raise ValueError(f"expected two images a pair, got {len(images)} images and pairs of shape {same_P.shape}")
    x: npt.NDArray[Any] = embed_images(backbone, images, batch_size=batch_size, group=group, each=each).cpu().numpy()
    return PairEmbeddings(x[0::2], x[1::2], same_P)
