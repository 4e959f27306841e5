"""Embeddings of all images of a set, row i that of image i; and the weights of the backbone that makes them.

Legend: N images, B batch, D components of an embedding, W ranks, K rows that are named.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from backbones import Backbone, build_backbone, normalise_pixels
from data.errors import DataError, said
from evaluation.decoding import decoded
from evaluation.embed.output import Output
from evaluation.embed.sources import Source
from sharding import shard_of

NAMED = 10
"""Images that do not decode and are named."""


class EmbedError(ValueError):
    """Weights or settings are not as expected; one line: what was expected, found, and what to do."""


class Embedded(NamedTuple):
    """What came of it, the same on all ranks."""

    bad: int
    """Images that do not decode; their rows are zero."""
    not_finite: int
    """Images whose embedding was not finite; their rows are zero."""
    first_bad: tuple[int, ...]
    """Rows of the first NAMED that do not decode."""


def load_backbone(name: str, *, embedding_size: int, weights: Path) -> Backbone:
    """A backbone with the weights of a file, in evaluation mode, on the CPU.

    weights: as `train_dist.py` writes them (backbone.pt); nothing in it is run, and no more is read than it has bytes.
    Raises EmbedError when the file is missing or not a file of weights, or they are those of another backbone or size.
    """
    try:
        backbone = build_backbone(name, embedding_size=embedding_size)
    except ValueError as error:
        raise EmbedError(f"--backbone: {error}") from None
    state = read_weights(weights)
    try:
        backbone.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise EmbedError(
            f"{weights}: expected the weights of {name} with {embedding_size} components: {said(error):.240}: "
            "name the backbone and size that they were trained with, or the run's folder with --run"
        ) from None
    return backbone.eval()


def read_weights(weights: Path, *, lazily: bool = False) -> Any:
    """What torch.save wrote to a file, tensors on the CPU; nothing in it is run, and no more is read than it has bytes.

    lazily: leaves tensors on the disk until they are read, where torch can; their checksums are not compared then.
    Raises EmbedError, one line, when it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        _refuse_compressed(weights)
        mapped = lazily and zipfile.is_zipfile(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch guesses at what is odd; below, one line says it
            state = torch.load(weights, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise EmbedError(f"{weights}: cannot read it ({error.strerror}): expected weights (backbone.pt)") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise EmbedError(f"{weights}: damaged, or not a file of weights ({_reason(error):.160})") from None
    return state


def _reason(error: Exception) -> str:
    """In a line; torch's own words on what it refuses advise to load it all the same."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it names {named[1]}, which is refused"
    if isinstance(error, pickle.UnpicklingError):
        return "what is pickled in it is no plain weights"
    return said(error)


def _refuse_compressed(weights: Path) -> None:
    """Raises ValueError: torch stores tensors as they are, and would inflate a small file to any size."""
    if zipfile.is_zipfile(weights):
        with zipfile.ZipFile(weights) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > weights.stat().st_size:
            raise ValueError(f"it claims {claimed} bytes, more than it has")


def embed_all(
    backbone: Backbone,
    source: Source,
    out: Output,
    *,
    batch_size: int,
    threads: int,
    dtype: npt.DTypeLike = np.float16,
    raw: bool = False,
    group: dist.ProcessGroup,
    progress: Callable[[int], None] = lambda images: None,
) -> Embedded:
    """Write the embeddings (N, D) of all images, row by row, and what says which image a row is of.

    An embedding is the sum of those of the image and its mirror image, as `evaluation.embed` has it, scaled to unit
    length unless it is to be raw. dtype: float16 or float32. Each rank embeds consecutive batches, the same batches on
    any number of ranks. An image that does not decode has a row of zeros. progress: called with the number of this
    rank's images that are done.

    Collectives: five all-reduces of a few numbers. Raises DataError, on every rank alike, when ranks do not see the
    same images, or one cannot write.
    """
    rank, device = dist.get_rank(group), next(backbone.parameters()).device
    _refuse_others(source, group, device)
    mine = rows_of(rank, dist.get_world_size(group), len(source), batch_size)
    sidecars = source.sidecars() if rank == 0 else {}
    shape = (len(source), backbone.embedding_size)
    found = _Found()
    with out.rows(mine, shape, np.dtype(dtype), sidecars, group) as file:
        for rows_BD in _embedded(backbone, source, mine, batch_size, threads, np.dtype(dtype), raw, found):
            file.write(rows_BD.tobytes())
            progress(len(rows_BD))
    return _together(found, group, device)


def rows_of(rank: int, world_size: int, rows: int, batch_size: int) -> range:
    """The rows that a rank embeds: whole batches, as even as they can be."""
    batches = shard_of(rank, world_size, -(-rows // batch_size))
    return range(min(rows, batches.start * batch_size), min(rows, batches.stop * batch_size))


def _refuse_others(source: Source, group: dist.ProcessGroup, device: torch.device) -> None:
    mine = torch.tensor([len(source), source.stamp], device=device)
    both = torch.cat([mine, -mine])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if not torch.equal(both[:2], -both[2:]):
        raise DataError(
            f"{source.where}: expected the same images on all ranks, found others: all hosts must see one folder, and "
            "nothing may be written to it meanwhile"
        )


@dataclass(slots=True)
class _Found:
    """Of one rank. bad: rows of images that do not decode. not_finite: how many embeddings were not."""

    bad: list[int] = field(default_factory=list)
    not_finite: int = 0


def _together(found: _Found, group: dist.ProcessGroup, device: torch.device) -> Embedded:
    """One all-reduce: counts, and each rank's first bad rows in a place of its own."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    named_WK = torch.zeros(world_size, NAMED, dtype=torch.int64)
    first = found.bad[:NAMED]
    named_WK[rank, : len(first)] = torch.tensor(first, dtype=torch.int64) + 1
    counts = torch.tensor([len(found.bad), found.not_finite])
    total = torch.cat([counts, named_WK.flatten()]).to(device)
    dist.all_reduce(total, group=group)
    bad, not_finite, *named = total.tolist()
    return Embedded(bad, not_finite, tuple(row - 1 for row in named if row)[:NAMED])


def _embedded(
    backbone: Backbone,
    source: Source,
    mine: range,
    batch_size: int,
    threads: int,
    dtype: np.dtype[np.generic],
    raw: bool,
    found: _Found,
) -> Iterator[npt.NDArray[Any]]:
    """The rows of this rank, (B, D) of a batch at a time; what is odd is added to `found`."""
    device = next(backbone.parameters()).device

    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    pinned = device.type == "cuda"
    drafts = decoded(source.decode, batches, batch_size=batch_size, threads=threads, pinned=pinned)
    with contextlib.closing(drafts):
        for draft in drafts:
            rows_BD = _embed(backbone, draft.images_BHW3.to(device, non_blocking=True), dtype, raw)
            finite_B = np.isfinite(rows_BD).all(axis=1)
            rows_BD[draft.bad_B | ~finite_B] = 0
            found.bad += [draft.samples[row] for row in np.flatnonzero(draft.bad_B).tolist()]
            found.not_finite += int((~finite_B & ~draft.bad_B).sum())
            yield rows_BD


@torch.no_grad()
def _embed(backbone: Backbone, images_BHW3: Tensor, dtype: np.dtype[np.generic], raw: bool) -> npt.NDArray[Any]:
    """Embeddings (B, D), not finite where the network's are not or `dtype` cannot hold them."""
    x_B3HW = normalise_pixels(images_BHW3.permute(0, 3, 1, 2))
    x_BD = (backbone(x_B3HW) + backbone(x_B3HW.flip(-1))).float()
    if not raw:
        length_B1 = x_BD.norm(dim=1, keepdim=True)
        x_BD = x_BD / length_B1.clamp_min(torch.finfo(torch.float32).tiny)
        x_BD = torch.where(length_B1.isfinite(), x_BD, torch.nan)  # what is divided by infinity is zero
    with np.errstate(over="ignore"):
        return np.asarray(x_BD.cpu().numpy().astype(dtype))
