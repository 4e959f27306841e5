"""Memory of this rank, for the log."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GB by their TensorBoard names; the same names for every rank of a run.

    memory/resident_gb: what the process holds of the host's memory now, files that it has mapped included. On GPUs the
    peaks since the last call as well: memory/allocated_gb, of tensors, and memory/reserved_gb, of what torch keeps for
    them. No wait for the GPU.
    """
    values = {"memory/resident_gb": int(_STATM.read_text(encoding="ascii").split()[1]) * _PAGE / 1e9}
    if device.type == "cuda":
        values["memory/allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        values["memory/reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return values
