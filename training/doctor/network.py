"""Where ranks meet: the host's name resolves, and its port is free."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from configs.schema import ConfigError
from training.doctor.finding import Finding

_PORT = 29500
"""torchrun's."""
_SLOW = 2.0


class Endpoint(NamedTuple):
    """given: by the user, not torchrun's own, which --standalone does without."""

    host: str
    port: int
    given: bool


def endpoint(rdzv: str, environment: Mapping[str, str] = os.environ) -> Endpoint:
    """Of `--rdzv HOST[:PORT]`, else of MASTER_ADDR and MASTER_PORT, else torchrun's. Raises ConfigError."""
    if rdzv:
        host, _, port = rdzv.rpartition(":") if ":" in rdzv else (rdzv, "", str(_PORT))
        where = "--rdzv"
    else:
        host, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", str(_PORT))
        where = "environment variable MASTER_PORT"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{where}: expected a port, 1 to 65535, got {port!r}")
    return Endpoint(host.strip("[]"), int(port), bool(rdzv) or "MASTER_ADDR" in environment)


def meeting_place(place: Endpoint) -> Iterator[Finding]:
    """Resolves the name and, where it is this host's, binds the port for a moment."""
    name, began = f"{place.host}:{place.port}", time.monotonic()
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        cure = "correct the name; in Kubernetes it is there once the first pod runs"
        yield Finding("rendezvous host", "fail", f"{place.host}: expected an address ({error.strerror})", cure)
        return
    took = time.monotonic() - began
    text = f"{place.host} is {found[0][4][0]}, after {took:.1f} s"
    if took > _SLOW:
        yield Finding("rendezvous host", "warn", f"{text}: every rank waits so long", "look at the name server")
    else:
        yield Finding("rendezvous host", "pass", text)
    if not any(_is_here(family, str(address[0])) for family, _, _, _, address in found):
        yield Finding(
            "rendezvous port", "pass", f"{name}: on another host, run the doctor there to see whether it is free"
        )
        return
    yield port(place)


def port(place: Endpoint) -> Finding:
    """Whether rank 0, or torchrun, can listen there. torch listens on every address of the host."""
    name = "rendezvous port"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", place.port))
            listener.listen()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            text = f"expected port {place.port} to be free, {'it is in use' if taken else error.strerror}"
            cure = "end what listens there (ss -ltnp), or another port: MASTER_PORT, torchrun --rdzv_endpoint=HOST:PORT"
            cure += "" if place.given else ", or torchrun --standalone, which finds one"
            return Finding(name, "fail" if place.given else "warn", text, cure)
    return Finding(name, "pass", f"{place.port} is free")


def _is_here(family: int, address: str) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
