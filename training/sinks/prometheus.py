"""The newest values, at a port of rank 0, for Prometheus to fetch."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.monitor import MonitorConfig
from configs.schema import RunConfig
from data.contact_sheet import Pixels
from training.sinks.base import Names, library, run_name

_PREFIX = "clusterface_"
_UP, _STEP, _STEPS = (_PREFIX + name for name in ("up", "step", "steps"))
_OF_OTHER_KINDS = re.compile(r".*_(total|count|sum|bucket|info|created)")
"""Names that end so are no gauges' by OpenMetrics; tools take loss_total for a counter."""
_PATIENCE_S = 10.0
"""For a client that says nothing."""


class _Server(socketserver.ThreadingTCPServer):
    """Not http.server's own, which looks its host's name up, and in some releases shares its port with another run
    (https://github.com/python/cpython/issues/127319).
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: str, port: int, handler: Any) -> None:
        """Raises OSError: the port is in use, or the address not this host's."""
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        super().__init__((str(found[4][0]), port), handler)

    def handle_error(self, *_: Any) -> None:
        """A client that went away is nobody's concern."""


class Prometheus:
    """A sink that waits for nobody. Gauges have the names of their tags, loss/margin as clusterface_loss_margin, and
    the name of the output folder as their label run.
    """

    name = "Prometheus"

    def __init__(self, config: MonitorConfig) -> None:
        """Raises ConfigError without prometheus_client."""
        self._client = library("prometheus_client", "prometheus", "monitor.prometheus_port")
        self._core = library("prometheus_client.core", "prometheus", "monitor.prometheus_port")
        self._address, self._port = config.prometheus_address, config.prometheus_port
        self._names = Names(_spelled, taken=(_UP, _STEP, f"{_STEPS}_total"))
        self._lock, self._run = threading.Lock(), ""
        self._step: int | None = None
        """Of the last report; None before the first."""
        self._steps = 0
        """Since the first; they never go back."""
        self._gauges: dict[str, tuple[str, float]] = {}
        """By name: tag and value."""
        self._server: _Server | None = None

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        """Raises OSError, also where the port is in use."""
        self._run = run_name(output)
        registry = self._client.CollectorRegistry()
        registry.register(self)
        handler = self._client.MetricsHandler.factory(registry)
        handler.timeout = _PATIENCE_S
        try:
            self._server = _Server(self._address, self._port, handler)
        except OSError as error:
            raise OSError(f"{self._address}, port {self._port}: {error.strerror}") from None
        threading.Thread(target=self._server.serve_forever, name=self.name, daemon=True).start()
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self._port}/metrics"

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        with self._lock:
            if self._step is not None:
                self._steps += max(0, step - self._step)
            self._step = step
            for tag, value in values.items():
                self._gauges[self._names(tag)] = (tag, value)

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        """Prometheus has numbers only."""

    def close(self, *, failed: bool) -> None:
        """The port is free afterwards."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def collect(self) -> Iterable[Any]:
        """For prometheus_client: everything, as it is now."""
        with self._lock:
            gauges = {_UP: ("1: the run goes on", 1.0), **self._gauges}
            if self._step is not None:
                gauges[_STEP] = ("optimizer steps of the run", self._step)
            steps = self._steps
        for name, (what, value) in gauges.items():
            gauge = self._core.GaugeMetricFamily(name, _shown(what), labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge
        counter = self._core.CounterMetricFamily(_STEPS, "optimizer steps that this process reported", labels=["run"])
        counter.add_metric([self._run], steps)
        yield counter


def _spelled(tag: str) -> str:
    name = _PREFIX + re.sub("[^A-Za-z0-9_]", "_", tag)
    return f"{name}_value" if _OF_OTHER_KINDS.fullmatch(name) else name


def _shown(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
