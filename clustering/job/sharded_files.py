"""Matrices that are sharded by row in memory and whole in a file, which rank 0 alone writes and reads.

Legend: S rows of one rank's shard, D columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.together import InputError, raise_together
from clustering.job.writing import appearing
from clustering.service.parts import map_array
from clustering.service.shards import show_rows
from sharding import all_shards


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


def read_sharded(
    path: Path,
    total: int,
    dim: int,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """This rank's rows of a .npy (total, dim) that rank 0 reads, (S, D) of `dtype`: float32 or int64.

    Raises InputError on all ranks when it is another file. Collectives: one all-reduce, one broadcast a rank.
    """
    rank, matrix_KD, error = dist.get_rank(group), None, ""
    name, kinds = str(dtype).removeprefix("torch."), "f" if dtype.is_floating_point else "i"
    if rank == 0:
        try:
            matrix_KD = map_array(path, kinds=kinds, shape=(total, dim), what=f"{name} ({total}, {dim})")
        except InputError as raised:
            error = str(raised)
    raise_together(error, group, device)
    own_SD = torch.empty(0, dim, dtype=dtype, device=device)
    for owner, shard in enumerate(all_shards(dist.get_world_size(group), total)):
        part_SD = torch.empty(shard.size, dim, dtype=dtype, device=device)
        if matrix_KD is not None:
            part_SD.copy_(torch.from_numpy(matrix_KD[shard.start : shard.stop].astype(name)))
        if dist.get_world_size(group) > 1 and shard.size:
            dist.broadcast(part_SD, group=group, group_src=0)
        if owner == rank:
            own_SD = part_SD
    return own_SD
