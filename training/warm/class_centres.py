"""Class centres that were learnt before, by blocks, and how the centres of other classes are filled with them.

Legend: C classes of the new head, P pairs of a new class and an old one, b rows of a block, D components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.embed.files import map_array
from training.checkpoint import CheckpointError, Saved
from training.warm.class_map import ClassMap
from training.warm.safetensors_file import read_tensors
from training.weight_files import read_state

BLOCK = 1 << 15
"""Rows that are in memory at a time."""
_EXPORTED = "centres"
"""Name of the tensor in a file that `python -m training checkpoint export` wrote."""


class Centres(Protocol):
    """Of one head without sub-centres."""

    @property
    def num_classes(self) -> int:
        """How many there are."""

    @property
    def dim(self) -> int:
        """D."""

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """(first class, (b, D) floating point), all classes in their order. Raises CheckpointError, DataError."""


@dataclass(frozen=True, slots=True)
class SavedCentres:
    """Of a checkpoint of ours."""

    saved: Saved
    num_classes: int
    dim: int

    @classmethod
    def of(cls, saved: Saved) -> SavedCentres:
        """Raises CheckpointError, also where the head has sub-centres."""
        try:
            settings, classes = saved.values["settings"], int(saved.values["settings"]["records"]["classes"])
            subcentres = settings["head"]["subcentres"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.address}: not a checkpoint of this program ({error!r})") from None
        if subcentres != 1:
            raise CheckpointError(
                f"{saved.address}: expected a head with one centre for each class, found head.subcentres = "
                f"{subcentres!r}: begin with its backbone alone (`python -m training checkpoint export`)"
            )
        shape = saved.shape("head.weight")
        if len(shape) != 2 or shape[0] != classes:
            raise CheckpointError(f"{saved.address}: expected a centre for each of {classes} classes, found {shape}")
        return cls(saved, *shape)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """See `Centres`."""
        for first in range(0, self.num_classes, BLOCK):
            rows_bD = self.saved.read("head.weight", first, min(first + BLOCK, self.num_classes))
            yield first, _finite(rows_bD, self.saved.address)


@dataclass(frozen=True, slots=True)
class FileCentres:
    """Of a file that `python -m training checkpoint export --what centres` wrote, mapped and not read."""

    path: Path
    matrix_CD: Any
    """numpy's, or torch's."""
    num_classes: int
    dim: int

    @classmethod
    def of(cls, path: Path) -> FileCentres:
        """Raises CheckpointError, DataError unless it is such a .npy, .pt or .safetensors."""
        if path.suffix == ".npy":
            matrix_CD = map_array(path, kinds="f", dimensions=2, what="class centres, floating point (classes, D)")
            return cls(path, matrix_CD, *matrix_CD.shape)
        found: Any = read_tensors(path) if path.suffix == ".safetensors" else read_state(path, lazily=True)
        centres_CD = found.get(_EXPORTED) if isinstance(found, dict) else None
        if not isinstance(centres_CD, Tensor) or centres_CD.dim() != 2 or not centres_CD.is_floating_point():
            raise CheckpointError(
                f"{path}: expected class centres, as `python -m training checkpoint export --what centres` writes them"
            )
        return cls(path, centres_CD, *centres_CD.shape)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """See `Centres`."""
        for first in range(0, self.num_classes, BLOCK):
            rows_bD = self.matrix_CD[first : first + BLOCK]
            if not isinstance(rows_bD, Tensor):
                rows_bD = torch.from_numpy(np.array(rows_bD, dtype=rows_bD.dtype.newbyteorder("=")))
            yield first, _finite(rows_bD, str(self.path))


def _finite(rows_bD: Tensor, where: str) -> Tensor:
    if not rows_bD.isfinite().all():
        raise CheckpointError(f"{where}: some of its class centres are not finite: has that training diverged?")
    return rows_bD


@torch.no_grad()
def fill(weight_CD: Tensor, centres: Centres, classes: ClassMap) -> float:
    """Write the centres of classes that have a counterpart; the mean length of those that were taken.

    weight_CD: on the CPU. A class with one counterpart takes its centre bit for bit, but for a rounding to weight_CD's
    dtype; one with several takes the direction of their weighted mean, at that mean length. Others stay as they are.
    Raises what `centres.rows` raises.
    """
    order = np.argsort(classes.old_P, kind="stable")
    new_P, old_P = torch.from_numpy(classes.new_P[order]), classes.old_P[order]
    weight_P = torch.from_numpy(classes.weight_P[order])
    is_joined_C = torch.from_numpy(classes.count_C > 1)
    joined = is_joined_C.nonzero().flatten()
    weight_CD[joined] = 0
    lengths = 0.0
    for first, rows_bD in centres.rows():
        low, high = np.searchsorted(old_P, [first, first + len(rows_bD)])
        new_p, old_p = new_P[low:high], torch.from_numpy(old_P[low:high] - first)
        lengths += float(rows_bD[old_p].float().norm(dim=1).double().sum())
        is_joined_p = is_joined_C[new_p]
        alone_p = ~is_joined_p
        weight_CD[new_p[alone_p]] = rows_bD[old_p[alone_p]].to(weight_CD.dtype)
        parts_pD = F.normalize(rows_bD[old_p[is_joined_p]].float())
        parts_pD *= weight_P[low:high][is_joined_p, None]
        weight_CD.index_add_(0, new_p[is_joined_p], parts_pD.to(weight_CD.dtype))
    length = lengths / max(1, len(old_P))
    for some in joined.split(BLOCK):
        weight_CD[some] = (F.normalize(weight_CD[some].float()) * length).to(weight_CD.dtype)
    return length
