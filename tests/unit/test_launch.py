"""The entrypoint's reading of what schedulers set: pure, from variables to torchrun's options."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from torch.distributed.run import get_args_parser, parse_min_max_nnodes

from docker.hostlist import expand
from docker.launch import Passing, exit_code, wait_for_head
from docker.placement import LaunchError, Placement, placement
from docker.torchrun import count_gpus, torchrun_arguments

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[08-10]",
    "SLURM_STEP_ID": "0",
}
JOBSET = {"JOB_COMPLETION_INDEX": "2", "JOBSET_NAME": "faces", "REPLICATED_JOB_NAME": "hosts", "PET_NNODES": "4"}
OLD_PYTORCHJOB = {"MASTER_ADDR": "faces-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
PYTORCHJOB = {**OLD_PYTORCHJOB, "WORLD_SIZE": "32", "PET_NNODES": "4", "PET_NODE_RANK": "3"}
ELASTIC_PYTORCHJOB = {
    "PET_NNODES": "1:4",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "faces-worker-0:23456",
    "PET_MAX_RESTARTS": "3",
}
PLAIN = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Placement(1, 1, None, "", 29500, "clusterface")),
        (SLURM, Placement(3, 3, 1, "gpu08", 24567, "1234567")),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[09-10]"},
            Placement(2, 2, 1, "gpu09", 24567, "1234567"),
        ),
        ({**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, Placement(1, 1, 0, "", 24567, "1234567")),
        ({**SLURM, "MASTER_PORT": "5000"}, Placement(3, 3, 1, "gpu08", 5000, "1234567")),
        (JOBSET, Placement(4, 4, 2, "faces-hosts-0-0.faces", 29500, "faces")),
        ({**JOBSET, "JOBSET_SUBDOMAIN": "net"}, Placement(4, 4, 2, "faces-hosts-0-0.net", 29500, "faces")),
        (
            {"JOB_COMPLETION_INDEX": "1", "PET_NNODES": "2", "MASTER_ADDR": "faces-0.faces"},
            Placement(2, 2, 1, "faces-0.faces", 29500, "clusterface"),
        ),
        (OLD_PYTORCHJOB, Placement(4, 4, 3, "faces-master-0", 23456, "clusterface")),
        (PYTORCHJOB, Placement(4, 4, 3, "faces-master-0", 23456, "clusterface")),
        (ELASTIC_PYTORCHJOB, Placement(1, 4, None, "faces-worker-0", 23456, "clusterface")),
        (PLAIN, Placement(2, 2, 0, "10.0.0.1", 29500, "clusterface")),
        ({**PLAIN, "PET_MASTER_ADDR": "10.0.0.2"}, Placement(2, 2, 0, "10.0.0.2", 29500, "clusterface")),
        ({**PLAIN, "PET_RDZV_ENDPOINT": "host0"}, Placement(2, 2, 0, "host0", 29500, "clusterface")),
    ],
)
def test_placement(environment: dict[str, str], expected: Placement) -> None:
    assert placement(environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"PET_NNODES": "4:1"},
            "PET_NNODES: expected a number of hosts, or MIN:MAX such as 1:4, got '4:1': correct it",
        ),
        ({"PET_NNODES": "two"}, "PET_NNODES: expected a number of hosts, or MIN:MAX such as 1:4, got 'two'"),
        ({"PET_NNODES": "2"}, "MASTER_ADDR: expected the host of node 0, as the run has 2 hosts, got nothing: set it"),
        ({**PLAIN, "PET_NODE_RANK": "2"}, "(PET_NODE_RANK): expected a whole number from 0 to 1, got '2': correct it"),
        ({**PLAIN, "MASTER_PORT": "x"}, "MASTER_PORT: expected a whole number from 1 to 65535, got 'x': correct it"),
        ({**JOBSET, "PET_NNODES": ""}, "PET_NNODES: expected the number of pods, which Kubernetes does not tell them"),
        ({**JOBSET, "REPLICATED_JOB_NAME": ""}, "expected the name of the JobSet's replicated job, got nothing: take"),
        (
            {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"},
            "Slurm: expected a start by srun, as the job has 3 hosts, got one without: use srun",
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "24"},
            "Slurm: expected one task a host, got 24 tasks on 3: use srun --ntasks-per-node=1",
        ),
        (
            {**SLURM, "SLURM_JOB_NODELIST": "gpu[8-"},
            "SLURM_JOB_NODELIST: expected hosts such as gpu[01-04,7],login, got 'gpu[8-': start it by srun, or set",
        ),
    ],
)
def test_an_environment_that_describes_no_run_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError) as refused:
        placement(environment)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[1,3-4],login", ["gpu1", "gpu3", "gpu4", "login"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("gpu[099-101]", ["gpu099", "gpu100", "gpu101"]),
    ],
)
def test_host_lists_are_written_out(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a[1-2", "a]", "a[]", "a[2-1]", "a[x]", "a[1-2-3]"])
def test_what_is_no_host_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected (hosts|numbers and ranges) such as .*, got '"):
        expand(text)


def _options(environment: dict[str, str], *, gpus: int = 8, address: str = "10.0.0.9") -> dict[str, object]:
    """As torchrun itself reads them."""
    arguments = torchrun_arguments(environment, placement(environment), gpus=gpus, address=address)
    return vars(get_args_parser().parse_args([*arguments, "train.py"]))


def test_one_host_needs_no_meeting() -> None:
    read = _options({})
    assert (read["standalone"], read["nproc_per_node"], read["max_restarts"]) == (True, "8", 0)
    assert read["signals_to_handle"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert read["shutdown_timeout"] == 120


def test_a_fixed_number_of_hosts_meets_at_the_first() -> None:
    read = _options(SLURM)
    assert (read["rdzv_backend"], read["nnodes"], read["node_rank"]) == ("static", "3", 1)
    assert (read["master_addr"], read["master_port"], read["local_addr"]) == ("gpu08", 24567, "10.0.0.9")
    assert read["rdzv_conf"] == "timeout=1800"


def test_hosts_that_come_and_go_meet_again_and_again() -> None:
    read = _options({**JOBSET, "PET_NNODES": "1:4", "PET_MAX_RESTARTS": "3", "PET_RDZV_CONF": "last_call_timeout=9"})
    assert (read["rdzv_backend"], read["max_restarts"], read["rdzv_id"]) == ("c10d", 3, "faces")
    assert parse_min_max_nnodes(str(read["nnodes"])) == (1, 4)
    assert read["rdzv_endpoint"] == "faces-hosts-0-0.faces:29500"
    assert read["rdzv_conf"] == "join_timeout=1800,is_host=0,last_call_timeout=9"


@pytest.mark.parametrize(
    ("variables", "restarts"),
    [({"PET_NNODES": "2:4"}, 10), ({"PET_NNODES": "2:4", "PET_MAX_RESTARTS": "0"}, 0), ({"PET_NNODES": "4"}, 0)],
)
def test_ranks_start_anew_where_a_host_may_leave(variables: dict[str, str], restarts: int) -> None:
    """Those of the hosts that stay fail then, and torchrun with them if it has no restart left."""
    assert _options({**JOBSET, **variables})["max_restarts"] == restarts


def test_the_first_host_keeps_the_store() -> None:
    assert "is_host=1" in str(_options({**PLAIN, "PET_MAX_RESTARTS": "1"})["rdzv_conf"])


def test_torchrun_looks_for_the_head_where_no_host_has_a_number() -> None:
    assert _options(ELASTIC_PYTORCHJOB, address="")["rdzv_conf"] == "join_timeout=1800"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PET_RDZV_BACKEND": "etcd"}, "PET_RDZV_BACKEND: expected static or c10d, got 'etcd': leave it out"),
        ({"PET_RDZV_BACKEND": "static", "PET_MAX_RESTARTS": "1"}, "PET_RDZV_BACKEND: expected c10d, as hosts or ranks"),
        ({"PET_MAX_RESTARTS": "-1"}, "PET_MAX_RESTARTS: expected a whole number, got '-1': correct it"),
        ({"PET_SHUTDOWN_TIMEOUT": "2m"}, "PET_SHUTDOWN_TIMEOUT: expected whole seconds, got '2m': correct it"),
        ({"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE: expected a number of ranks, or auto, got '0': correct it"),
        ({"PET_NODE_RANK": ""}, "PET_NODE_RANK: expected this host's number, from 0, got nothing: set it, 0 on the"),
    ],
)
def test_options_that_do_not_fit_are_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError) as refused:
        _options({**PLAIN, **variables})
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("environment", "files", "gpus"),
    [
        ({}, ["nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"], 2),
        ({}, [], 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], 0),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, ["nvidia0"], 2),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b", "SLURM_GPUS_ON_NODE": "1"}, [], 2),
        ({"SLURM_GPUS_ON_NODE": "4"}, ["nvidia0"], 4),
    ],
)
def test_gpus_are_counted(tmp_path: Path, environment: dict[str, str], files: list[str], gpus: int) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert count_gpus(environment, tmp_path) == gpus


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks"),
    [("", 0, "1"), ("auto", 0, "1"), ("auto", 4, "4"), ("2", 8, "2"), ("cpu", 0, "cpu")],
)
def test_a_rank_for_each_gpu_unless_told_otherwise(wanted: str, gpus: int, ranks: str) -> None:
    assert _options({"PET_NPROC_PER_NODE": wanted}, gpus=gpus)["nproc_per_node"] == ranks


@pytest.mark.parametrize(
    ("torchrun", "ranks", "signalled", "expected"),
    [
        (0, [0, 0], 0, 0),
        (0, [0, 0], 15, 0),  # it was just finished
        (1, [75, 75], 15, 75),
        (1, [2, 76], 0, 2),  # the first is the cause
        (1, [0, 76], 0, 76),
        (1, [], 0, 1),  # an exception, or SIGKILL
        (1, [], 15, 143),  # before there was anything to save
        (-15, [], 15, 143),
        (-9, [], 0, 137),
        (-9, [75], 0, 75),
    ],
)
def test_exit_code(torchrun: int, ranks: list[int], signalled: int, expected: int) -> None:
    assert exit_code(torchrun, ranks, signalled) == expected


@pytest.fixture
def passing() -> Iterator[Passing]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield Passing()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_during_the_start_reaches_torchrun(passing: Passing) -> None:
    passing.starting()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)  # the first counts
    with subprocess.Popen(["sleep", "60"]) as child:
        passing.to(child)
        assert child.wait(10) == -signal.SIGTERM
    assert passing.got == signal.SIGTERM


class _Torchrun:
    def __init__(self) -> None:
        self.sent: list[int] = []

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


class _HitAtOnce(Passing):
    """A signal comes the moment torchrun is known."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_child" and value is not None:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("passing")  # it puts the handlers back
def test_torchrun_gets_a_signal_once_whenever_it_comes() -> None:
    """Its second one would cut the save short."""
    passing, torchrun = _HitAtOnce(), _Torchrun()
    passing.starting()
    passing.to(cast("subprocess.Popen[bytes]", torchrun))
    assert torchrun.sent == [signal.SIGTERM]


def test_a_head_that_never_answers_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError) as refused:
        wait_for_head(Placement(2, 2, 1, "127.0.0.1", 9, "run"), patience=0)
    assert str(refused.value).startswith("127.0.0.1:9: expected node 0 to answer within 0 s, got: Connection refused: ")
    assert not capsys.readouterr().err
