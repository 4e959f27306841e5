"""A pool of gloo ranks that lives for the whole test session.

Starting a process that imports torch takes seconds; the suite holds hundreds of comparisons of 1, 2 and 4
ranks. So four workers are started once, as forks of a process that has imported what they need; each makes the
groups of the first 1, 2, 3 and 4, and a test sends them a module-level function `fn(group, *args)`. Results come
back in rank order; an exception in any rank is raised in the test with that rank's traceback; a hang is ended
after `timeout` seconds and the pool starts afresh.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.distributed import Ranks

WORLD_SIZES = (1, 2, 4)
_GROUPS = (1, 2, 3, 4)
"""World sizes that a test may ask for."""
_calls: dict[int, int] = {}


def _work(rank: int, rendezvous: str, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=max(WORLD_SIZES),
        timeout=datetime.timedelta(seconds=120),
    )
    groups = {world: dist.new_group(list(range(world))) for world in _GROUPS}
    while True:
        world, fn, args = pipe.recv()
        try:
            pipe.send(("ok", fn(groups[world], *args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


class RankPool:
    """Runs a function on the first `world_size` of four gloo ranks."""

    def __init__(self) -> None:
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._workers: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["training.trainer"])
        rendezvous = str(Path(tempfile.mkdtemp(prefix="ranks-")) / "rendezvous")
        for rank in range(max(WORLD_SIZES)):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, rendezvous, theirs), daemon=True)
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call `fn(group, *args)` on ranks 0 … world_size-1 and return what they returned, in rank order."""
        if not self._workers:
            self._start()
        for pipe in self._pipes[:world_size]:
            pipe.send((world_size, fn, args))
        deadline = time.monotonic() + timeout
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {world_size} gave no answer within {timeout} s")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text) in enumerate(answers) if kind == "error"]
        if failures:
            self.close()  # the other ranks may sit in a collective that nobody will join
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()  # nothing is left that would be worth the seconds of an orderly end
        for worker in self._workers:
            worker.join(20)
        self._pipes, self._workers = [], []


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    """What training knows of a rank, for a group of this pool, on the CPU. Each has a store of its own with the others:
    the ranks of a group call it alike.
    """
    world_size = dist.get_world_size(group)
    _calls[world_size] = _calls.get(world_size, 0) + 1
    return Ranks(
        rank=dist.get_rank(group),
        world_size=world_size,
        device=torch.device("cpu"),
        group=group,
        store=dist.PrefixStore(f"{world_size}/{_calls[world_size]}", dist.distributed_c10d._get_default_store()),
    )
