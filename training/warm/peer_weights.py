"""Weights of arcface_torch's runs: its backbones, and its class centres, which each rank keeps in a file of its own.

Backbones have the keys of ours (`backbones`), as a bare state dict (model.pt, backbone.pth), or within a rank's
checkpoint (checkpoint_gpu_0.pt, `state_dict_backbone`). Centres are (C_local, D), cut over the ranks by the rule of
`sharding`: softmax_fc_gpu_{rank}.pt and the checkpoints' `state_dict_softmax_fc` hold them as `weight`, older
rank_{rank}_softmax_weight.pt bare. Facts: what users of arcface_torch write and read in public code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones import build_backbone, names
from sharding import shard_of
from training.checkpoint import CheckpointError
from training.weight_files import read_state, write_rows, write_weights

_RANK_FILE = re.compile(
    r"(softmax_fc_gpu_|checkpoint_gpu_|rank[_:](?=\d+_softmax_weight))(\d{1,5})(?:_softmax_weight)?\.pt"
)
_DDP = "module."
_NAMED = 5


class Weights(NamedTuple):
    """Of a backbone."""

    tensors: dict[str, Tensor]
    backbones: tuple[str, ...]
    """Names of ours that they fit; variants of one network share them."""
    embedding_size: int
    bare: bool
    """Whether the file holds just them, under the keys of ours."""


def backbone_weights(path: Path) -> Weights:
    """Raises CheckpointError, one line, unless the file holds all weights of a backbone that there is here."""
    state = read_state(path)
    found = state.get("state_dict_backbone", state) if isinstance(state, dict) else state
    if not (isinstance(found, dict) and found and all(isinstance(v, Tensor) for v in found.values())):
        raise CheckpointError(f"{path}: expected the weights of a backbone, tensors by name, found {_kind(found)}")
    wrapped = all(str(key).startswith(_DDP) for key in found)
    tensors = {str(key).removeprefix(_DDP) if wrapped else str(key): value for key, value in found.items()}
    dim, fitting = _fitting({key: tensor.shape for key, tensor in tensors.items()})
    if not fitting:
        some = ", ".join(list(tensors)[:_NAMED])
        raise CheckpointError(
            f"{path}: its {len(tensors)} tensors ({some[:200]}, …) are those of no backbone here: expected one of "
            f"{', '.join(names())}"
        )
    return Weights(tensors, fitting, dim, not wrapped and found is state)


def _fitting(shapes: dict[str, torch.Size]) -> tuple[int, tuple[str, ...]]:
    """Components of an embedding, and the backbones that have such tensors, in any order: (0, ()) where none has."""
    likely = [name for name in names() if _shapes(name, 1).keys() == shapes.keys()]
    for dim in {shape[0]: None for shape in reversed(shapes.values()) if shape} if likely else {}:
        if fitting := tuple(name for name in likely if _shapes(name, dim) == shapes):
            return dim, fitting
    return 0, ()


@functools.lru_cache(maxsize=64)
def _shapes(name: str, dim: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in build_backbone(name, embedding_size=dim).state_dict().items()}


def write_backbone(weights: Weights, out: Path) -> None:
    """A bare state dict, as `backbone.pt`. Raises DataError."""
    write_weights({key: tensor.contiguous() for key, tensor in weights.tensors.items()}, out)


@dataclass(frozen=True, slots=True)
class Heads:
    """Class centres in one file for each rank, in their order."""

    files: tuple[Path, ...]
    num_classes: int
    dim: int

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """First class and (C_local, D) float32 of each file. Raises CheckpointError when one has changed or is
        damaged.
        """
        for rank, file in enumerate(self.files):
            shard = shard_of(rank, len(self.files), self.num_classes)
            centres = _centres(file, lazily=False).float()
            if centres.shape != (shard.size, self.dim):
                raise CheckpointError(f"{file}: has changed while it was read")
            if not centres.isfinite().all():
                raise CheckpointError(f"{file}: some of its class centres are not finite: has that training diverged?")
            yield shard.start, centres


def heads_at(places: Sequence[Path]) -> Heads:
    """Files of all ranks, from their names or from the folder that they are in.

    Raises CheckpointError unless they are of one kind, ranks 0 to W - 1 are there, each once, and their sizes are those
    of one head that was cut over W ranks.
    """
    by_rank: dict[int, Path] = {}
    kinds: dict[str, Path] = {}
    for path in _files(places):
        match = _RANK_FILE.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path}: expected a rank's file, softmax_fc_gpu_0.pt, checkpoint_gpu_0.pt or rank_0_softmax_weight.pt"
            )
        kinds.setdefault(match[1], path)
        rank = int(match[2])
        if len(kinds) == 1 and rank in by_rank:
            raise CheckpointError(f"{path}: expected one file for rank {rank}, found {by_rank[rank]} too")
        by_rank[rank] = path
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise CheckpointError(f"{other}: expected files of one kind, found {one.name} too: name those that count")
    ranks = len(by_rank)
    if missing := sorted(set(range(ranks)) - set(by_rank)):
        raise CheckpointError(
            f"expected the files of ranks 0 to {ranks - 1}, as there are {ranks}; rank {missing[0]} is missing"
        )
    files = tuple(by_rank[rank] for rank in range(ranks))
    shapes = [_centres(file, lazily=True).shape for file in files]
    total, dim = sum(shape[0] for shape in shapes), shapes[0][1]
    for rank, (file, shape) in enumerate(zip(files, shapes, strict=True)):
        expected = (shard_of(rank, ranks, total).size, dim)
        if shape != expected:
            raise CheckpointError(
                f"{file}: expected {expected[0]} x {expected[1]} numbers, as {total} classes cut over {ranks} ranks "
                f"have, found {shape[0]} x {shape[1]}: are all files of one run, and is none missing?"
            )
    return Heads(files, total, dim)


def _files(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        try:
            inside = sorted(place.iterdir()) if place.is_dir() else [place]
        except OSError as error:
            raise CheckpointError(f"{place}: cannot read it ({error.strerror})") from None
        if place.is_dir():
            inside = [path for path in inside if _RANK_FILE.fullmatch(path.name)]
        if not inside:
            raise CheckpointError(f"{place}: expected files of class centres (softmax_fc_gpu_0.pt, …), found none")
        found += inside
    return found


def _centres(path: Path, *, lazily: bool) -> Tensor:
    found = state = read_state(path, lazily=lazily)
    if isinstance(state, dict):
        found = state.get("state_dict_softmax_fc", state)
        found = found.get("weight") if isinstance(found, dict) else found
    if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point() or not found.shape[1]:
        raise CheckpointError(
            f"{path}: expected class centres, `weight` of (classes, components), found {_kind(found)}"
        )
    return found


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def write_centres(heads: Heads, out: Path) -> None:
    """All centres, (C, D) by class, as .npy in float32. Raises CheckpointError, DataError."""
    write_rows((centres for _, centres in heads.rows()), (heads.num_classes, heads.dim), out)
