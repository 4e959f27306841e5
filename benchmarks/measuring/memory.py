"""Peak memory of a piece of work, above what is held before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_extra(work: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that `work` needs at its peak beyond what is allocated when it begins; None where that is not known.

    CUDA: from the caching allocator, exact. CPU: the highest resident set of this process (VmHWM) after `work`, less
    the one before. Writing 5 to clear_refs first sets that mark down to what is resident now, so that an earlier peak
    does not hide this one; `getrusage` cannot do that, and its mark survives exec. Linux only. Measure on CPUs in a
    process of its own with MALLOC_MMAP_THRESHOLD_ set low, so that freed tensors leave the resident set at once.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR.write_text("5", encoding="ascii")
        held = _highest()
        work()
        return _highest() - held
    except OSError:
        return None


def _highest() -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
