"""An error of one rank raised on all of them: a rank that goes on alone would wait for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from partial_fc.collectives import all_reduce_

T = TypeVar("T")
_BYTES = 1000


class InputError(ValueError):
    """A file or setting of a stand-alone job is not as expected; one line: what was expected, found, and what to do."""


def together(work: Callable[[], T], group: dist.ProcessGroup, device: torch.device) -> T:
    """work() on this rank, or InputError on all ranks when it raised one on any: the first such rank's words.

    work must not run collectives. Collectives: one all-reduce, one broadcast more when a rank failed.
    """
    error, value = "", None
    try:
        value = work()
    except InputError as raised:
        error = str(raised)
    raise_together(error, group, device)
    return value  # type: ignore[return-value]


def raise_together(error: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise InputError on all ranks where any has an error to tell (not empty). As `together` otherwise."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    first = int(all_reduce_(torch.tensor(rank if error else world_size, device=device), group, dist.ReduceOp.MIN))
    if first == world_size:
        return
    words = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    if rank == first:
        spoken = error.encode()[:_BYTES]
        words[: len(spoken)] = torch.tensor(list(spoken), dtype=torch.uint8, device=device)
    dist.broadcast(words, group=group, group_src=first)
    raise InputError(bytes(words.tolist()).rstrip(b"\0").decode(errors="replace"))


def on_rank_zero(work: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> None:
    """work() on rank 0 alone; InputError on all ranks when it raised one. As `together` otherwise."""
    together(work if dist.get_rank(group) == 0 else lambda: None, group, device)
