"""Work of one rank amid work of all: what goes wrong in it must not keep the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from clustering.errors import ClusterStateError
from partial_fc.collectives import all_reduce_

T = TypeVar("T")

_WORDS = 240  # bytes of a failure's words that reach the other ranks


class Guard:
    """Runs the local parts of a refresh. The first exception is kept, and from then on nothing is run any more.

    Parts that run collectives are called outside of it, on every rank, with what the local parts gave: on a rank that
    failed, something harmless of the right shape.
    """

    def __init__(self) -> None:
        self.failure = ""
        """What went wrong here, in a line; empty while nothing did."""

    def run(self, what: str, work: Callable[[], T], otherwise: T) -> T:
        """work(), or `otherwise` when it raises or something failed before. what: named in the failure."""
        if self.failure:
            return otherwise
        try:
            return work()
        except Exception as error:  # whatever it is: training goes on without this refresh
            words = (str(error) or "no message").splitlines()[0]
            self.failure = f"{what}: {type(error).__name__}: {words}"
            return otherwise


def agree(version: int, failure: str, group: dist.ProcessGroup, device: torch.device) -> str:
    """What failed, on all ranks alike: empty when nothing did on any; else the first such rank's words, and its number.

    version: of the clusters that this rank holds. Raises ClusterStateError, on all ranks, when ranks stand at different
    ones. One all-reduce, one more when a rank failed; waits for them.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    told = torch.tensor([version, -version, world_size - rank if failure else 0], device=device)
    newest, oldest, failed = all_reduce_(told, group, dist.ReduceOp.MAX).tolist()
    if -oldest != newest:
        raise ClusterStateError(
            f"ranks hold cluster versions from {-oldest} to {newest}: resume all from the same checkpoint"
        )
    if not failed:
        return ""
    first = world_size - failed
    words = torch.zeros(_WORDS, dtype=torch.int32, device=device)
    if rank == first:
        spoken = failure.encode()[:_WORDS]
        words[: len(spoken)] = torch.tensor(list(spoken), dtype=torch.int32, device=device)
    said = bytes(all_reduce_(words, group).tolist()).rstrip(b"\0").decode(errors="replace")
    return f"rank {first}, {said}"
