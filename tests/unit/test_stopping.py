"""What signals leave behind, rank by rank; whole runs are in tests/integration/test_stopping.py."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.ranks import RankPool, ranks_of
from training import stopping
from training.stopping import SIGNALS, Signals, Stopped, StopRequest


def _steps(group: dist.ProcessGroup, marked: int) -> list[str]:
    """Rank `marked` gets a signal before its fourth step."""
    ranks = ranks_of(group)
    before = [signal.getsignal(number) for number in SIGNALS]
    heard = []
    with Signals() as signals:
        stop = StopRequest(ranks, signals)
        for step in range(8):
            if step == 3 and ranks.rank == marked:
                os.kill(os.getpid(), signal.SIGUSR1)
            heard.append(stop.due())
        with pytest.raises(Stopped, match="SIGUSR1"):
            stop.check_now()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    return heard


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_hear_of_it_at_the_same_step(ranks: RankPool, world_size: int) -> None:
    lag = 0 if world_size == 1 else stopping._LAG_CPU
    expected = [""] * (3 + lag) + ["SIGUSR1"] * (5 - lag)
    assert ranks.run(world_size, _steps, world_size - 1) == [expected] * world_size


def _impatient(group: dist.ProcessGroup) -> list[bool]:
    stopping._IMPATIENT_S = 0.05
    raised = []
    with Signals():
        for wait in (0.0, 0.0, 0.1):
            time.sleep(wait)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                raised.append(False)
            except KeyboardInterrupt:
                raised.append(True)
    return raised


def test_a_second_ctrl_c_counts_some_seconds_after_the_first(ranks: RankPool) -> None:
    """One that comes at once is torchrun's."""
    assert ranks.run(1, _impatient) == [[False, False, True]]
