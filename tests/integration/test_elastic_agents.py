"""Torchrun with `--nnodes=1:2`: one of two hosts leaves for good, and the other goes on alone, with the same batch."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.integration.conftest import ROOT, environment
from tests.launches import Launch
from training.checkpoint import Saved, place_of

STEPS, GLOBAL = 16, 24
RESUMED = re.compile(r"resumed at step (\d+)")
_QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5,join_timeout=120,close_timeout=1"
"""Of the rendezvous: a host that is silent for five seconds is gone (less, and a busy machine makes one gone that is
there), and two seconds are waited for another one.
"""


def _saved(output: Path, step: int) -> Saved:
    return Saved(place_of(str(output / "checkpoints")), f"step_{step:09d}")


def test_the_host_that_is_left_goes_on_from_the_newest_checkpoint(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (
        "train.epochs=2",
        f"train.batch_size={GLOBAL}",
        f"train.global_batch={GLOBAL}",
        "train.checkpoint_steps=2",
        "train.keep_checkpoints=20",
        "train.log_steps=1",
        "model.shard=all",  # one rank then holds the whole backbone
    )
    arguments = command(2, *settings)
    arguments = arguments[arguments.index("train_dist.py") :]
    agent = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"]
    agent += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two", "--local_addr=127.0.0.1"]
    agent += ["--monitor_interval=0.1"]

    def start(is_host: int) -> Launch:
        whole = [*agent, f"--rdzv_conf={_QUICK},is_host={is_host}", *arguments]
        return Launch(whole, cwd=ROOT, environment=environment())

    with start(1) as stays:
        with start(0) as leaves:
            first = _first_to_say("step 7/", (stays, leaves))  # rank 0 may be on either
            assert "2 rank(s) on cpu" in first.told
            assert f"{GLOBAL} images a step" in first.told
        # Its torchrun and its rank are killed here.
        assert stays.process.wait(120) == 0, stays.told
    alone = stays.told[stays.told.index("1 rank(s) on cpu") :]
    assert f"{GLOBAL} images a step" in alone
    resumed = RESUMED.search(alone)
    assert resumed, stays.told
    output = tmp_path / "run"
    assert 4 <= int(resumed[1]) < STEPS
    assert _saved(output, int(resumed[1])).manifest.world_size == 2
    assert _saved(output, STEPS).manifest.world_size == 1
    assert (output / "backbone.pt").exists()


def _first_to_say(text: str, launches: tuple[Launch, ...]) -> Launch:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for launch in launches:
            if text in launch.told:
                return launch
        time.sleep(0.05)
    raise TimeoutError("\n".join(launch.told for launch in launches))
