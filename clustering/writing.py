"""Files that appear whole or not at all.

Legend: S rows of one rank's shard, D columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.shards import show_rows
from clustering.together import InputError, raise_together
from sharding import all_shards


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, renamed to it at the end.

    When the block raises, or the disk is full, the new file is removed and an older one of that name stays as it was.
    Raises InputError where the system refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write it ({error.strerror}): make room, or name another place; what was there before is "
            "as it was"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """A whole file at once. Raises InputError."""
    with appearing(path) as file:
        file.write(content)


def write_sharded(
    path: Path, own_SD: Tensor, total: int, group: dist.ProcessGroup, *, dtype: npt.DTypeLike = np.float32
) -> None:
    """Rank 0 writes the rows of all ranks, in rank order, as one .npy of `dtype`.

    own_SD: this rank's rows, sharded over `total` by `sharding.shard_of`; a vector (S,) gives a vector. Raises
    InputError on all ranks when it cannot be written. Collectives: one broadcast a rank, one all-reduce.
    """
    shards = all_shards(dist.get_world_size(group), total)
    rows_SX = own_SD[:, None] if own_SD.dim() == 1 else own_SD
    parts = (show_rows(rows_SX, shard, source, group) for source, shard in enumerate(shards))

    def write() -> None:
        with appearing(path) as file:
            _write_header(file, (total, *own_SD.shape[1:]), np.dtype(dtype))
            for part_SX in parts:
                file.write(part_SX.cpu().numpy().astype(dtype).tobytes())

    error = ""
    if dist.get_rank(group) == 0:
        try:
            write()
        except InputError as raised:
            error = str(raised)
    for _ in parts:  # also what rank 0 could not write is shown: the other ranks wait for it
        pass
    raise_together(error, group, own_SD.device)


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def on_rank_zero(work: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> None:
    """work() on rank 0 alone; InputError on all ranks when it raised one. One all-reduce."""
    error = ""
    if dist.get_rank(group) == 0:
        try:
            work()
        except InputError as raised:
            error = str(raised)
    raise_together(error, group, device)
