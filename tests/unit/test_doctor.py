"""What the doctor says of planted faults: each check judges plain facts."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import (
    ConfigError,
)
from training.__main__ import main
from training.doctor import gpus, host, network, processes
from training.doctor.finding import Check, Finding, Once, examine, size_text
from training.doctor.gpus import Gpu, GpuFacts
from training.doctor.network import Endpoint
from training.doctor.processes import Ended

MB, GB = 10**6, 10**9


# ---- running checks ------------------------------------------------------------------------------------------------


def test_findings_come_in_order_and_no_check_ends_the_others() -> None:
    def crash() -> Iterator[Finding]:
        yield Finding("lost", "pass", "")
        raise KeyError("planted")

    def refuse() -> Iterator[Finding]:
        raise ConfigError("train.output: planted: cure")

    never = threading.Event()
    findings = examine(
        [
            Check("hangs", lambda: [Finding("", "pass", "")] if never.wait(60) else [], 0.2),
            Check("crashes", crash, 60),
            Check("refuses", refuse, 60),
            Check("opens", lambda: [Finding("", "pass", Path("/nowhere/x").read_text())], 60),
            Check("is well", lambda: [Finding("is well", "pass", "yes")], 60),
        ]
    )
    never.set()
    assert [(f.name, f.state) for f in findings] == [
        ("hangs", "fail"), ("crashes", "fail"), ("refuses", "fail"), ("opens", "fail"), ("is well", "pass")
    ]  # fmt: skip
    hangs, crashes, refuses, opens, _ = findings
    assert "within 0.2 s" in hangs.text
    assert "KeyError: 'planted'" in crashes.text
    assert refuses.text == "train.output: planted: cure"
    assert opens.text == "/nowhere/x: No such file or directory"


def test_what_several_need_is_made_once_and_its_error_is_everybodys() -> None:
    calls = []
    once = Once(lambda: calls.append(1) or "made")
    assert [once(), once()] == ["made", "made"]
    failing: Once[int] = Once(lambda: calls.append(2) or int("planted"))
    for _ in range(2):
        with pytest.raises(ValueError, match="planted"):
            failing()
    assert calls == [1, 2]
    assert failing.made is None


@pytest.mark.parametrize(("count", "text"), [(12, "12 bytes"), (2_500, "2.5 kB"), (3e9, "3.0 GB"), (4.5e12, "4.5 TB")])
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text


# ---- host ----------------------------------------------------------------------------------------------------------


def test_versions() -> None:
    assert [f.state for f in host.versions()] == ["pass", "pass"]
    old = list(host.versions((3, 9, 1), "2.4.1+cu121"))
    assert [f.state for f in old] == ["fail", "fail"]
    assert "expected 2.11 or newer, found 2.4.1+cu121" in old[1].text


def test_cores() -> None:
    assert host.cores(10, 2, 4).state == "pass"
    few = host.cores(8, 4, 4)
    assert (few.state, few.cure) == ("warn", "--set data.threads=1, or more cores")
    assert host.cores(1, 4, 1).cure == "fewer ranks, or more cores"
    assert host.cores_here() > 0


def test_shared_memory() -> None:
    dockers = host.shared_memory(64 << 20, 8, nccl=True)
    assert dockers.state == "warn"
    assert "268.4 MB" in dockers.text
    assert "--shm-size" in dockers.cure
    assert host.shared_memory(8 << 20, 2, nccl=True).state == "fail"
    assert host.shared_memory(None, 2, nccl=True).state == "fail"
    assert host.shared_memory(GB, 8, nccl=True).state == "pass"
    assert host.shared_memory(0, 8, nccl=False).state == "pass", "gloo and the loaders use none"
    assert host.shared_memory(0, 1, nccl=True).state == "pass"
    assert host.shared_memory_here("/nowhere") is None


def test_limits() -> None:
    assert host.open_files(host.UNLIMITED, ranks=8, record_files=1, threads=4).text.startswith("limit none")
    low = host.open_files(256, ranks=64, record_files=100, threads=4)
    assert (low.state, low.cure.split(";")[0]) == ("fail", "ulimit -n 4096")
    assert host.processes(10_000, local_ranks=8, threads=4).state == "pass"
    assert host.processes(100, local_ranks=8, threads=4).state == "fail"
    assert host.process_limit() > 0
    assert host.locked_memory(8 << 20).state == "pass"
    assert "InfiniBand" in host.locked_memory(8 << 20).text
    assert host.memory_here() > 0


# ---- GPUs ----------------------------------------------------------------------------------------------------------

H100 = Gpu(name="H100", capability=(9, 0), free=79 * GB, total=80 * GB)
FACTS = GpuFacts(gpus=(H100,) * 4, cuda="13.0", architectures=("sm_80", "sm_90"), nccl="2.29.3", driver="580.1")


def _states(facts: GpuFacts, **settings: object) -> dict[str, Finding]:
    wanted = {"device": "auto", "local_ranks": 4, "precision": "bf16", **settings}
    return {finding.name: finding for finding in gpus.gpus(facts, **wanted)}  # type: ignore[arg-type]


def test_gpus_that_are_well() -> None:
    found = _states(FACTS)
    assert {finding.state for finding in found.values()} == {"pass"}
    assert "4 x H100; driver 580.1, torch built for CUDA 13.0" in found["GPUs"].text
    assert _states(FACTS, local_ranks=2)["GPUs"].state == "warn"
    assert "not used" in _states(FACTS, device="cpu")["GPUs"].text


@pytest.mark.parametrize(
    ("facts", "cure"),
    [
        (replace(FACTS, gpus=(H100,)), "start fewer ranks"),
        (GpuFacts(gpus=(), cuda="13.0", warning="driver too old"), "load the driver"),
        (GpuFacts(gpus=(), driver="580.1"), "install a torch with CUDA"),
    ],
)
def test_too_few_gpus(facts: GpuFacts, cure: str) -> None:
    asked = _states(facts, device="cuda")["GPUs"]
    assert asked.state == "fail"
    assert cure in asked.cure
    assert facts.warning in asked.text
    auto = _states(facts)
    assert [(name, finding.state) for name, finding in auto.items()] == [("GPUs", "warn")]
    assert "would train on CPUs" in auto["GPUs"].text
    assert not gpus.will_use(facts, "auto", 4)


def test_gpus_that_this_torch_or_this_run_cannot_use() -> None:
    new = replace(FACTS, gpus=(replace(H100, capability=(12, 0)),) * 4)
    assert _states(new)["GPU kernels"].state == "fail"
    assert "sm_120" in _states(new)["GPU kernels"].text
    assert gpus.has_kernels((12, 0), ("sm_90", "compute_90")), "the driver compiles it"
    assert gpus.has_kernels((8, 6), ("sm_80",))
    assert not gpus.has_kernels((8, 0), ("sm_86", "sm_75"))
    assert gpus.has_kernels((12, 0), ("sm_120",))
    broken = replace(FACTS, gpus=(H100, replace(H100, error="CUDA error: busy"), H100, H100))
    assert "GPU 1: CUDA error: busy" in _states(broken)["GPU kernels"].text
    turing = replace(FACTS, gpus=(replace(H100, capability=(7, 5)),) * 4, architectures=("sm_75",))
    assert "fp16" in _states(turing)["precision"].cure
    assert _states(turing, precision="fp32")["precision"].state == "pass"
    mixed = replace(FACTS, gpus=(H100, replace(H100, name="A100", free=GB), H100, H100))
    assert _states(mixed)["GPU kinds"].state == "warn"
    assert "GPU 1" in _states(mixed)["GPU memory"].text


def test_collectives() -> None:
    assert "NCCL 2.29.3" in gpus.nccl(FACTS, on_gpus=True).text
    assert gpus.nccl(replace(FACTS, nccl=""), on_gpus=True).state == "fail"
    assert "gloo" in gpus.nccl(FACTS, on_gpus=False).text


# ---- processes -----------------------------------------------------------------------------------------------------


def test_processes_that_hang_are_ended() -> None:
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    fails = [sys.executable, "-c", "raise SystemExit('error: planted')"]
    ended = processes.run([(hangs, {}), (fails, {})], 2)
    assert ended[0].code is None
    assert (ended[1].code, processes.last_line(ended[1].err)) == (1, "planted")


def test_a_driver_that_hangs_or_fails_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, said in (("import time; time.sleep(600)", "to answer within"), ("1 / 0", "ZeroDivisionError")):
        monkeypatch.setattr(processes, "_probe", lambda *_, c=command: [sys.executable, "-c", c])
        with pytest.raises(ConfigError, match=said):
            processes.gpu_facts(seconds=2)


def test_gpu_facts_travel_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "H100", "capability": [9, 0], "free": 1, "total": 2, "error": ""}
    build = {"cuda": "13.0", "architectures": ["sm_90"], "nccl": "2.29", "driver": "580", "warning": ""}
    text = json.dumps({"gpus": [gpu], **build})
    monkeypatch.setattr(processes, "run", lambda *_: [Ended(0, text, "")])
    facts = processes.gpu_facts()
    assert facts.gpus == (Gpu(name="H100", capability=(9, 0), free=1, total=2),)
    assert facts.architectures == ("sm_90",)


def test_what_became_of_a_group() -> None:
    well, hangs, fails = Ended(0, "", ""), Ended(None, "", ""), Ended(1, "", "noise\nerror: no way to rank 0\n")
    assert processes.judge_group([well, well], "gloo", 9).state == "pass"
    assert "within 9 s" in processes.judge_group([well, hangs], "NCCL", 9).text
    bad = processes.judge_group([hangs, fails], "gloo", 9)
    assert bad.text.endswith(": no way to rank 0")
    assert "GLOO_SOCKET_IFNAME" in bad.cure


# ---- network -------------------------------------------------------------------------------------------------------


def test_where_ranks_meet() -> None:
    assert network.endpoint("", {}) == Endpoint("127.0.0.1", 29500, given=False)
    assert network.endpoint("host0", {}) == Endpoint("host0", 29500, given=True)
    assert network.endpoint("[::1]:29", {}) == Endpoint("::1", 29, given=True)
    environment = {"MASTER_ADDR": "host1", "MASTER_PORT": "1234"}
    assert network.endpoint("", environment) == Endpoint("host1", 1234, given=True)
    for rdzv, port in (("host0:x", ""), ("host0:70000", ""), ("", "abc")):
        with pytest.raises(ConfigError, match="expected a port"):
            network.endpoint(rdzv, {"MASTER_PORT": port})


@pytest.mark.parametrize(("given", "state"), [(True, "fail"), (False, "warn")])
def test_a_port_in_use(given: bool, state: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        host_line, port_line = network.meeting_place(Endpoint("localhost", number, given))
    assert (host_line.state, port_line.state) == ("pass", state)
    assert f"port {number} to be free, it is in use" in port_line.text
    assert ("--standalone" in port_line.cure) is not given
    assert network.port(Endpoint("localhost", number, given)).state == "pass", "it is free again"


def test_a_host_without_a_name_and_one_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = network.meeting_place(Endpoint("no.such.host.invalid", 1234, given=True))
    assert (line.name, line.state) == ("rendezvous host", "fail")
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 1234))  # for documents: nobody's
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [address])
    _, port_line = network.meeting_place(Endpoint("host7", 1234, given=True))
    assert "on another host" in port_line.text


# ---- command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "expected a whole number from 1"),
        (["--set", "train.epoch=1"], "did you mean train.epochs?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot read it"),
        (["--rdzv", "host0:port"], "--rdzv: expected a port"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    try:
        code = main(["doctor", *arguments])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("error: ")
    assert said in printed.err


def test_no_data_and_no_way_to_write_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    well: Callable[..., Finding] = lambda **_: Finding("process group", "pass", "")  # noqa: E731
    monkeypatch.setattr(processes, "group", well)
    (tmp_path / "checkpoints").write_text("no folder")
    settings = [f"data.path={tmp_path}/none", f"train.output={tmp_path}", "train.device=cpu"]
    code = main(["doctor", "--json", *(part for setting in settings for part in ("--set", setting))])
    found = json.loads(capsys.readouterr().out)
    failed = {finding["name"]: finding["text"] for finding in found["findings"] if finding["state"] == "fail"}
    assert (code, found["failed"], found["memory"]) == (1, 2, [])
    assert "train.rec: missing" in failed["records"]
    assert "train.checkpoints: cannot write" in failed["output"]
