"""A rank that is stopped, a launcher that is killed: what is said, how soon, and that nothing is left running."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from tests.integration.conftest import ROOT, environment
from tests.launches import Launch

Command = Callable[..., list[str]]
TIMEOUT = 8
# No checkpoints on the way: a rank that waits for one to be written has its own way to say so.
LONG = (f"train.timeout={TIMEOUT}", "train.epochs=400", "clustering.enabled=false", "train.checkpoint_steps=100000")
OPERATION = r"has waited for \d+ s at step \d+, \w+, .+ in \w+ \([a-z_]+/[a-z_]+\.py:\d+\)"


def test_a_stopped_rank_is_named_with_the_operation_that_waits_for_it(command: Command) -> None:
    with Launch(command(2, *LONG), cwd=ROOT, environment=environment()) as run:
        stopped_at = run.until("step 8/", 120)
        stopped = run.ranks()[1]
        os.kill(stopped, signal.SIGSTOP)
        said_at = run.until("error: ", 60)
        os.kill(stopped, signal.SIGCONT)  # torchrun would kill it, but only after half a minute
        run.gone(30)
        line = next(line for _, line in run.lines if line.startswith("error: "))
    assert said_at - stopped_at < TIMEOUT + 10
    assert re.match(rf"error: rank 1 \(\S+, pid {stopped}\) has not been heard of for \d+ s, last at step \d+", line)
    assert re.search(OPERATION, line)
    assert run.told.count("error: ") == 1
    assert "exitcode  : 76" in run.told
    assert 'train_dist.py", line' not in run.told, "no traceback of ours"


def test_ranks_end_with_a_launcher_that_was_killed(command: Command, tmp_path: Path) -> None:
    with Launch(command(2, *LONG), cwd=ROOT, environment=environment()) as run:
        run.until("step 8/", 120)
        os.kill(run.process.pid, signal.SIGKILL)
        run.gone(30)
        said = re.search(r"stopped by SIGTERM after (\d+) of", run.told)
    assert said, run.told
    assert int(said[1]) >= 8
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step_{int(said[1]):09d}"
