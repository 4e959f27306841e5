"""Two hosts, as network namespaces: a cut network is told on both, and the run that goes on ends as if it never was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.load import load_config
from tests.integration.conftest import ROOT, environment
from tests.integration.test_faults import OPERATION, TIMEOUT
from tests.launches import Launch
from tests.namespaces import INTERFACE, TwoHosts, launcher, why_not
from tests.ranks import RankPool, ranks_of
from training.stopping import Signals
from training.trainer import Trainer

Command = Callable[..., list[str]]


def _train(group: dist.ProcessGroup, settings: list[str]) -> str:
    return Trainer(load_config(None, settings), ranks_of(group)).run(Signals())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "backbone.pt", weights_only=True)
    return weights


def test_a_partition_is_told_and_the_run_goes_on_to_the_same_end(
    ranks: RankPool, command: Command, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    plain = command(2, name="whole")
    assert ranks.run(2, _train, plain[plain.index("train_dist.py") + 2 :: 2]) == ["", ""]  # one host

    arguments = command(2, f"train.timeout={TIMEOUT}", "train.checkpoint_steps=2", "train.log_steps=1", name="parts")
    arguments = arguments[arguments.index("train_dist.py") :]

    def start(host: int) -> Launch:
        return Launch(
            [*launcher(host), *arguments],
            cwd=ROOT,
            environment={**environment(), "GLOO_SOCKET_IFNAME": INTERFACE},
            prefix=hosts.prefix(host),
        )

    with TwoHosts() as hosts:
        with start(0) as first, start(1) as second:
            first.until("step 6/", 120)
            hosts.cut()
            begin = first.lines[-1][0]
            for host, run in enumerate((first, second)):
                assert run.until("error: ", TIMEOUT + 30) - begin < TIMEOUT + 10
                line = next(line for _, line in run.lines if line.startswith("error: "))
                assert re.search(rf"rank {host} \(host-{host}, pid \d+\) {OPERATION}", line), line
                run.ranks_gone(15)
            assert "rank 1 (host-1, pid" in first.told
            assert "rank 1 cannot reach the store at 10." in second.told
            first.gone(30)
            hosts.join()  # the other host's torchrun still asks a store that is gone: it is ended with this block
        assert not (tmp_path / "parts" / "backbone.pt").exists()
        with start(0) as first, start(1) as second:
            for run in (first, second):
                assert run.process.wait(120) == 0, run.told
            assert re.search(r"resumed at step \d+", first.told)
    whole, parts = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
