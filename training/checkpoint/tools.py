"""What can be done with a checkpoint outside of a run: verify, export, cut anew. No process group."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from data.files import appearing
from sharding import Rows, shard_of
from training.checkpoint.errors import CheckpointError, DamagedError
from training.checkpoint.folder import Checkpoints, folder_of, part_of
from training.checkpoint.manifest import BLOCK, Facts, assembled
from training.checkpoint.part import write
from training.checkpoint.places import Place, place_of
from training.checkpoint.saved import Saved
from training.weight_files import write_rows, write_weights

_NAMED = re.compile(r"step_\d+")
_ROWS = 1 << 16
"""Rows that are in memory at a time."""


def checkpoints_at(where: str) -> tuple[Checkpoints, list[str]]:
    """Checkpoints of a run's output, of its folder of checkpoints, or a single one; and their folders, newest last.

    Folders that no save has finished are left out. Raises CheckpointError where there is none.
    """
    where = where.rstrip("/")
    above, _, last = where.rpartition("/")
    try:
        if _NAMED.fullmatch(last):
            found = _of(place_of(above or os.curdir))
            names = [last] if last in found.finished() else []
        else:
            found = _of(place_of(where))
            if not (names := found.finished()):
                found = _of(place_of(f"{where}/checkpoints"))
                names = found.finished()
    except OSError as error:
        raise CheckpointError(f"{where}: cannot read it ({error.strerror or error})") from None
    if not names:
        raise CheckpointError(
            f"{where}: expected the output of a run, its checkpoints, or one of them (step_…), found no checkpoint"
        )
    return found, names


def _of(place: Place) -> Checkpoints:
    return Checkpoints(place, keep=1, keep_best=0)


def newest_at(where: str) -> Saved:
    """The one that is named, or that a run would go on from. Raises CheckpointError where none is whole."""
    found, names = checkpoints_at(where)
    lines: list[str] = []
    named = _NAMED.fullmatch(where.rstrip("/").rpartition("/")[2])
    saved = Saved(found.place, names[0]) if named else next(found.newest_first(lines), None)
    if saved is None:
        raise CheckpointError("; ".join(lines) or f"{where}: no checkpoint in it was ever finished")
    return saved


def damage(saved: Saved) -> Iterator[tuple[int, str]]:
    """Reads all of it: of each block its bytes, and what is wrong with it, mostly nothing."""
    for name, part in saved.manifest.parts.items():
        for block in range(len(part.blocks)):
            wrong = ""
            try:
                saved.block(name, block)
            except DamagedError as error:
                wrong = str(error)
            yield min(BLOCK, part.size - block * BLOCK), wrong


def export_backbone(saved: Saved, out: Path) -> int:
    """Write the backbone's weights as `backbone.pt`, or as .safetensors, by the name; returns how many numbers.

    Raises CheckpointError when it is damaged, DataError when it cannot be written.
    """
    weights = saved.named("backbone.")
    _write(weights, out)
    return sum(tensor.numel() for tensor in weights.values())


def export_centres(saved: Saved, out: Path) -> int:
    """Write all class centres, (C sub-centres, D), by class: as .npy in float32, .pt, or .safetensors; as above."""
    if out.suffix != ".npy":
        centres = saved.read("head.weight")
        _write({"centres": centres}, out)
        return centres.numel()
    rows, dim = saved.shape("head.weight")
    starts = range(0, rows, _ROWS)
    write_rows((saved.read("head.weight", start, min(rows, start + _ROWS)) for start in starts), (rows, dim), out)
    return rows * dim


def _write(tensors: dict[str, Tensor], out: Path) -> None:
    if out.suffix != ".safetensors":
        write_weights(tensors, out)
        return
    with appearing([out]) as (partial,):
        write(place_of(str(partial.parent)), partial.name, tensors)


def reshard(saved: Saved, out: str, ranks: int, is_cut: Callable[[str], bool]) -> Saved:
    """Write it again as so many ranks would have, in `out`, where no checkpoint is yet, and name it in `latest` there.

    is_cut: whether a tensor is shared out over the ranks, by its name. Raises CheckpointError, OSError.
    """
    checkpoints = _of(place_of(out))
    folder = folder_of(saved.manifest.step)
    if there := checkpoints.folders():
        raise CheckpointError(f"{out}: expected no checkpoint there, found {there[0]}: name another folder")
    told, token = [], f"{time.time_ns():x}"
    for rank in range(ranks):
        tensors: dict[str, Rows | Tensor] = {}
        for name in saved.names:
            shape = saved.shape(name)
            if is_cut(name):
                shard = shard_of(rank, ranks, shape[0])
                tensors[name] = Rows(saved.read(name, *shard), shard.start, shape[0])
            elif rank == 0:
                tensors[name] = saved.read(name)
        told.append(write(checkpoints.place, f"{folder}/{part_of(rank, token)}", tensors))
    old = saved.manifest
    facts = Facts(step=old.step, run=old.run, values=old.values, score=old.score, evaluated=old.evaluated)
    checkpoints.publish(folder, assembled(told, facts), "")
    return Saved(checkpoints.place, folder)
