"""What Prometheus fetches from a run, read by its own parsers; bad ports, addresses and clients."""

from __future__ import annotations

import json
import math
import random
import socket
import urllib.request

import pytest

from tests.sinks import NOT_FINITE, ODD, Report, free_port, picture


def _fetch(port: int, host: str = "127.0.0.1", accept: str = "*/*") -> str:
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers={"Accept": accept})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return str(answer.read().decode())


def _values(text: str) -> dict[str, float]:
    parser = pytest.importorskip("prometheus_client.parser")
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    assert {json.dumps(sample.labels) for sample in samples} == {'{"run": "my run"}'}
    assert len({sample.name for sample in samples}) == len(samples)
    return {sample.name: sample.value for sample in samples}


def test_prometheus_fetches_the_newest_values(report: Report, lines: list[str]) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    sinks = report(f"prometheus_port={port}")
    assert _values(_fetch(port)) == {"clusterface_up": 1, "clusterface_steps_total": 0}
    sinks.scalars(50, {"loss/total": 9.0})
    sinks.scalars(100, ODD | NOT_FINITE)
    sinks.picture(100, "roc", picture())
    sinks.scalars(80, {"up": 5.0, "steps/total": 6.0})  # the guard has rolled back
    sinks.scalars(90, {'line\nbreak \\ "': 7.0})
    found = _values(_fetch(port))
    assert math.isnan(found.pop("clusterface_a_nan"))
    odd = "clusterface_verification_lfw___tar_far_1e_3"
    other = next(name for name in found if name.startswith(odd + "_"))
    assert found == {
        "clusterface_up": 1,
        "clusterface_step": 90,
        "clusterface_steps_total": 60,
        "clusterface_loss_total_value": 1.5,
        odd: 0.25,
        other: 0.75,
        "clusterface_a_inf": math.inf,
        "clusterface_a_low": -math.inf,
        next(name for name in found if name.startswith("clusterface_up_")): 5,
        "clusterface_steps_total_value": 6,
        "clusterface_line_break____": 7,
    }
    assert lines == [f"Prometheus: http://127.0.0.1:{port}/metrics"]
    sinks.close()
    sinks.close()
    with pytest.raises(OSError, match="refused"):
        _fetch(port)
    report(f"prometheus_port={port}").close()  # the next run has it at once
    assert len(lines) == 2


def test_prometheus_reads_it_as_openmetrics_too(report: Report) -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    port = free_port()
    sinks = report(f"prometheus_port={port}")
    sinks.scalars(7, ODD)
    text = _fetch(port, accept="application/openmetrics-text; version=1.0.0")
    sinks.close()
    assert text.endswith("# EOF\n")
    kinds = {family.name: family.type for family in parser.text_string_to_metric_families(text)}
    assert kinds.pop("clusterface_steps") == "counter"
    assert len(kinds) == 5
    assert set(kinds.values()) == {"gauge"}


def test_a_port_in_use_is_said_in_a_line(report: Report, lines: list[str]) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    first = report(f"prometheus_port={port}")
    first.scalars(1, {"loss": 1.0})
    second = report(f"prometheus_port={port}")
    second.scalars(2, {"loss": 2.0})
    second.close()
    assert _values(_fetch(port))["clusterface_loss"] == 1
    first.close()
    assert lines[1:] == [
        f"Prometheus: cannot report (127.0.0.1, port {port}: Address already in use): training goes on without it"
    ]


@pytest.mark.parametrize("address", ["192.0.2.1", "no such host", "a..b"])
def test_an_address_of_another_host_is_said_in_a_line(address: str, report: Report, lines: list[str]) -> None:
    pytest.importorskip("prometheus_client")
    report("prometheus_port=9400", f"prometheus_address={address}").close()
    assert len(lines) == 1
    assert lines[0].startswith("Prometheus: cannot report (")
    assert lines[0].endswith("): training goes on without it")


def test_prometheus_is_bound_to_the_address_that_is_set(report: Report, lines: list[str]) -> None:
    pytest.importorskip("prometheus_client")
    try:
        port = free_port("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    sinks = report(f"prometheus_port={port}", "prometheus_address='::1'")
    assert _values(_fetch(port, "[::1]"))["clusterface_up"] == 1
    with pytest.raises(OSError, match="refused"):
        _fetch(port)
    sinks.close()
    assert lines == [f"Prometheus: http://[::1]:{port}/metrics"]


def test_clients_that_misbehave_disturb_nobody(report: Report, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    sinks = report(f"prometheus_port={port}")
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    noise = random.Random(0).randbytes(3000)
    for rubbish in (
        b"",
        noise,
        b"GET /" + 70000 * b"x" + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends by a reset
            client.sendall(rubbish)
    assert _values(_fetch(port))["clusterface_up"] == 1
    sinks.close()
    for client in silent:
        client.close()
    assert capfd.readouterr() == ("", "")
