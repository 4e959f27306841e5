"""The entrypoint on two hosts, as network namespaces, from the variables that Slurm and Kubernetes set there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, environment
from tests.launches import Launch
from tests.namespaces import ADDRESSES, TwoHosts, why_not

Names = dict[str, str]
Start = Callable[[int, Names, int], Launch]


def _slurm(host: int) -> Names:
    return {
        "SLURM_JOB_ID": "417",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "host-[0-1]",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": str(host),
    }


def _jobset(host: int) -> Names:
    return {
        "JOB_COMPLETION_INDEX": str(host),
        "JOBSET_NAME": "faces",
        "REPLICATED_JOB_NAME": "hosts",
        "PET_NNODES": "2",
        "PET_RDZV_ID": "faces-0",
        "PET_RDZV_BACKEND": "c10d",
    }


NAMES = {0: "host-0 faces-hosts-0-0.faces", 1: "host-1"}
"""What the cluster's DNS would tell of each host."""


@pytest.fixture
def start(command: Callable[..., list[str]], tmp_path: Path) -> Iterator[Start]:
    """`start(host, variables, steps)`: the same run there, until that step; a line for each step."""
    if reason := why_not():
        pytest.skip(reason)
    names = tmp_path / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {NAMES[host]}" for host, address in enumerate(ADDRESSES))]
    names.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with TwoHosts() as hosts:

        def begin(host: int, variables: Names, steps: int) -> Launch:
            settings = ("train.log_steps=1", "train.epochs=1000", f"train.stop_after_steps={steps}")
            arguments = command(2, *settings)
            arguments = arguments[arguments.index("train_dist.py") + 1 :]
            known = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(names)]
            return Launch(
                ["-m", "docker.launch", *arguments],
                cwd=ROOT,
                environment={**environment(), **variables},
                prefix=[*hosts.prefix(host), *known],
            )

        yield begin


def test_two_hosts_of_a_jobset_train_together(start: Start, tmp_path: Path) -> None:
    with start(1, _jobset(1), 12) as second:
        second.until("waiting for ", 20)  # its head is not there yet
        with start(0, _jobset(0), 12) as first:
            assert first.process.wait(60) == 0, first.told
            assert second.process.wait(60) == 0, second.told
    told = first.told + second.told  # c10d may give rank 0 to either host
    assert "24 identities" in told
    assert "2 rank(s) on cpu" in told
    assert "step 12/" in told
    assert (tmp_path / "run/checkpoints/latest").read_text(encoding="utf-8").strip() == "step_000000012"
    assert len(list((tmp_path / "run/checkpoints/step_000000012").glob("rank_*.safetensors"))) == 2


def test_a_host_under_slurm_that_is_told_to_stop_stops_all_with_a_checkpoint(start: Start, tmp_path: Path) -> None:
    """As when a node is drained: only its task gets SIGTERM."""
    with start(0, _slurm(0), 5000) as first, start(1, _slurm(1), 5000) as second:
        first.until("step 2/", 60)
        os.kill(second.process.pid, signal.SIGTERM)
        assert second.process.wait(60) == 75, second.told
        assert first.process.wait(60) == 75, first.told
    assert "24 identities" in first.told  # static: rank 0 is on the first host
    assert "2 rank(s) on cpu" in first.told
    latest = (tmp_path / "run/checkpoints/latest").read_text(encoding="utf-8").strip()
    assert len(list((tmp_path / "run/checkpoints" / latest).glob("rank_*.safetensors"))) == 2
