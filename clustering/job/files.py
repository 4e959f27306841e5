"""Rows of k-means that lie in files: each rank's contiguous range, scaled to unit length as it is read.

Legend: N rows of all ranks, P rows of this rank, D embedding size, b rows of a block, Q rows asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.together import raise_together
from clustering.nearest.float64_rows import row_dots
from clustering.service.parts import PartFiles
from partial_fc.collectives import all_reduce_
from sharding import Shard, shard_of

_BLOCK = 4096
_NAMED = 5
"""Rows that are not finite and named in the error."""
_MIXER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64 holds it


def unit_rows(x_bD: Tensor) -> Tensor:
    """Rows scaled to unit length, float32; a zero row stays. x_bD: float32 or float64, finite, of any length.

    A row has the same bits whatever other rows are with it.
    """
    if x_bD.dtype == torch.float64:  # its squares could overflow, those of float32 cannot in float64
        x_bD = x_bD / x_bD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    row_b = torch.arange(len(x_bD), device=x_bD.device)
    length_b1 = row_dots(x_bD, row_b, x_bD, row_b).sqrt()[:, None] if len(x_bD) else x_bD.new_ones(0, 1)
    return torch.where(length_b1 > 0, x_bD / length_b1, 0).float()


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over all rows found, the same on all ranks."""

    zero_rows: int
    """Rows without direction; they belong to no cluster."""
    checksum: int
    """Of all rows and their order."""


class FileRows:
    """`clustering.service.rows.Rows` from files; see there. Rows are float32."""

    def __init__(self, files: PartFiles, *, group: dist.ProcessGroup, device: torch.device, in_memory: bool = False):
        """This rank's rows are its range of all by `sharding.shard_of`. Nothing is read before `survey`.

        in_memory: keep them on the device, whatever it has; else they are kept where they take a quarter of the free
        memory at most (60 % on GPUs), and read again in each pass where not.
        """
        self._files, self._group, self._device = files, group, device
        self.shard: Shard = shard_of(dist.get_rank(group), dist.get_world_size(group), files.rows)
        self.total: int = files.rows
        """N."""
        self.in_memory = in_memory or 4 * self.shard.size * files.dim <= _free_memory(device)
        self._kept_PD: Tensor | None = None

    @property
    def dim(self) -> int:
        return self._files.dim

    def __len__(self) -> int:
        return self.shard.size

    def block(self, start: int, stop: int) -> Tensor:
        if self._kept_PD is not None:
            return self._kept_PD[start:stop]
        stop = min(stop, self.shard.size)
        return self._unit(self._files.read(self.shard.start + start, self.shard.start + stop))

    def take(self, index_Q: Tensor) -> Tensor:
        if self._kept_PD is not None:
            return self._kept_PD.index_select(0, index_Q)
        return self._unit(self._files.take(index_Q.cpu().numpy() + self.shard.start))

    def _unit(self, rows_bD: npt.NDArray[Any]) -> Tensor:
        return unit_rows(torch.from_numpy(rows_bD).to(self._device))

    def survey(self, progress: Callable[[int], None] = lambda rows: None) -> Survey:
        """Read all rows once: look for what cannot be clustered, and keep them where they fit.

        progress: called with the number of rows that were read. Raises InputError on all ranks when any row has a
        number that is not finite. Collectives: three all-reduces.
        """
        kept_PD = torch.empty(len(self), self.dim, device=self._device) if self.in_memory else None
        bad: list[int] = []
        counts = torch.zeros(3, dtype=torch.int64)  # not finite, zero, checksum
        for start in range(self.shard.start, self.shard.stop, _BLOCK):
            stop = min(start + _BLOCK, self.shard.stop)
            x_bD = torch.from_numpy(self._files.read(start, stop))
            largest_b = x_bD.abs().amax(1)
            bad_b = ~largest_b.isfinite()
            if len(bad) < _NAMED:
                bad += (bad_b.nonzero()[:_NAMED, 0] + start).tolist()
            counts += torch.stack([bad_b.sum(), (largest_b == 0).sum(), _checksum(x_bD, start)])
            if kept_PD is not None:
                kept_PD[start - self.shard.start : stop - self.shard.start] = unit_rows(x_bD.to(self._device))
            progress(stop - start)
        not_finite, zero_rows, checksum = all_reduce_(counts.to(self._device), self._group).tolist()
        self._refuse(not_finite, bad)
        self._kept_PD = kept_PD
        return Survey(zero_rows, checksum)

    def _refuse(self, not_finite: int, bad: list[int]) -> None:
        rank, world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        named = torch.zeros(world_size, _NAMED, dtype=torch.int64, device=self._device)
        named[rank, : len(bad[:_NAMED])] = torch.tensor(bad[:_NAMED], dtype=torch.int64, device=self._device) + 1
        first = [row - 1 for row in all_reduce_(named, self._group).flatten().tolist() if row][:_NAMED]
        error = ""
        if not_finite:
            rows = ", ".join(map(str, first)) + (", …" if not_finite > len(first) else "")
            error = (
                f"{self._files.source}: {not_finite} of {self.total} rows hold numbers that are not finite: {rows} "
                f"(the first is {self._files.where(first[0])}): embed these images again, or set their rows to zero to "
                "leave them out"
            )
        raise_together(error, self._group, self._device)


def _checksum(x_bD: Tensor, first_row: int) -> Tensor:
    """Sum over rows of the row's bits times an odd number of its own, modulo 2^64."""
    bits_b = x_bD.view(torch.int64 if x_bD.dtype == torch.float64 else torch.int32).sum(1, dtype=torch.int64)
    row_b = torch.arange(first_row, first_row + len(x_bD))
    return (bits_b * ((row_b * _MIXER) | 1)).sum()


def _free_memory(device: torch.device) -> int:
    """Bytes that this rank may fill with rows."""
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    return available // 4 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
