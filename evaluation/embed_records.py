"""Embeddings of a whole record set in one .npy file: row i is the embedding of sample i.

Legend: N samples, S samples of this rank, B batch, D components of an embedding.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from backbones import IMAGE_SIZE, Backbone, build_backbone, normalise_pixels
from data.decode import decode_image
from data.errors import DataError
from data.prefetch import prefetch
from data.records import RecordSet
from sharding import shard_of

_AHEAD = 2


class EmbedError(ValueError):
    """Weights, settings or the output file are not as expected; one line: what was expected, found, and what to do."""


class Embedded(NamedTuple):
    """What came of it, the same on all ranks."""

    bad: int
    """Images that do not decode; their rows are zero."""
    not_finite: int
    """Images whose embedding was not finite; their rows are zero."""


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
        said = " ".join(str(error).split())
        raise EmbedError(
            f"{weights}: expected the weights of {name} with {embedding_size} components: {said:.240}: "
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
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_compressed(weights: Path) -> None:
    """Raises ValueError: torch stores tensors as they are, and would inflate a small file to any size."""
    if zipfile.is_zipfile(weights):
        with zipfile.ZipFile(weights) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > weights.stat().st_size:
            raise ValueError(f"it claims {claimed} bytes, more than it has")


def embed_records(
    backbone: Backbone,
    records: RecordSet,
    out: Path,
    *,
    batch_size: int,
    threads: int,
    dtype: npt.DTypeLike = np.float16,
    group: dist.ProcessGroup,
    progress: Callable[[int], None] = lambda images: None,
) -> Embedded:
    """Write unit embeddings (N, D) of all samples to `out`; the file appears whole or not at all.

    An embedding is the sum of those of the image and its mirror image, scaled to unit length, as `evaluation.embed`
    has it. dtype: float16 or float32. Rank r embeds the samples of shard_of(r, W, N) and writes their rows into one
    file that all ranks must reach. An image that does not decode has a row of zeros. progress: called with the number
    of this rank's images that are done.

    Collectives: four all-reduces of a few numbers. Raises EmbedError, on every rank alike, when the set's images have
    another size than the backbone takes, or the file cannot be written.
    """
    if records.image_size != IMAGE_SIZE:
        raise EmbedError(
            f"{records.address}: expected images of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels, property states "
            f"{records.image_size[0]} x {records.image_size[1]}"
        )
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = shard_of(rank, world_size, records.num_samples)
    shape = (records.num_samples, backbone.embedding_size)
    partial = out.with_name(f".{out.name}.part")
    counts = torch.zeros(2, dtype=torch.int64)
    try:
        with _on_all_ranks(group, partial):
            if rank == 0:
                out.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
        with _on_all_ranks(group, partial), partial.open("r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(mine.start * shape[1] * np.dtype(dtype).itemsize, os.SEEK_CUR)
            counts += _write_rows(backbone, records, range(*mine), file, batch_size, threads, np.dtype(dtype), progress)
            file.flush()
            os.fsync(file.fileno())
        with _on_all_ranks(group, partial):
            if rank == 0:
                partial.replace(out)
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    device = next(backbone.parameters()).device
    total = counts.to(device)
    dist.all_reduce(total, group=group)
    return Embedded(*total.tolist())


@contextlib.contextmanager
def _on_all_ranks(group: dist.ProcessGroup, path: Path) -> Iterator[None]:
    """Where the block fails to read or write on one rank, every rank raises EmbedError. One all-reduce."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    failed = torch.tensor([int(failure is not None)])
    if dist.get_backend(group) == "nccl":
        failed = failed.cuda()
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise EmbedError(f"{path}: cannot write it ({failure.strerror}): free space, or name another --out") from None
    if int(failed):
        raise EmbedError(f"{path}: another rank cannot write it: all hosts must reach it")


class _Draft:
    """Room for the pixels of one batch."""

    def __init__(self, samples: range, *, pinned: bool) -> None:
        self.samples = samples
        self.images_BHW3 = torch.zeros(len(samples), *IMAGE_SIZE, 3, dtype=torch.uint8, pin_memory=pinned)
        self.pixels_BHW3 = self.images_BHW3.numpy()
        self.bad_B = np.zeros(len(samples), dtype=bool)


def _write_rows(
    backbone: Backbone,
    records: RecordSet,
    mine: range,
    file: BinaryIO,
    batch_size: int,
    threads: int,
    dtype: np.dtype[np.generic],
    progress: Callable[[int], None],
) -> Tensor:
    """Write the rows of this rank one behind the other; (bad, not finite), int64."""
    device = next(backbone.parameters()).device

    def decode(draft: _Draft, rows: range) -> None:
        for row in rows[: max(0, len(draft.samples) - rows.start)]:
            try:
                decode_image(records.image(draft.samples[row])[1], IMAGE_SIZE, out=draft.pixels_BHW3[row])
            except DataError:
                draft.bad_B[row] = True

    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    drafts = (_Draft(samples, pinned=device.type == "cuda") for samples in batches)
    counts = torch.zeros(2, dtype=torch.int64)
    with contextlib.closing(prefetch(drafts, decode, rows=batch_size, threads=threads, ahead=_AHEAD)) as decoded:
        for draft in decoded:
            x_BD, finite_B = _embed(backbone, draft.images_BHW3.to(device, non_blocking=True))
            x_BD[draft.bad_B] = 0
            file.write(x_BD.astype(dtype).tobytes())
            counts += torch.tensor([draft.bad_B.sum(), (~finite_B & ~draft.bad_B).sum()])
            progress(len(draft.samples))
    return counts


@torch.no_grad()
def _embed(backbone: Backbone, images_BHW3: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Unit embeddings (B, D), zero where one is not finite; and which are finite."""
    x_B3HW = normalise_pixels(images_BHW3.permute(0, 3, 1, 2))
    x_BD = (backbone(x_B3HW) + backbone(x_B3HW.flip(-1))).float()
    x_BD = x_BD / x_BD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    finite_B = x_BD.isfinite().all(1)
    return torch.where(finite_B[:, None], x_BD, 0).cpu().numpy(), finite_B.cpu().numpy()
