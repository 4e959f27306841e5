"""Two hosts on one: network namespaces, each with its host name, joined by one cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from types import TracebackType

INTERFACE = "cable"
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], text=True, capture_output=True, check=False, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def why_not() -> str:
    """Why this machine makes no namespaces; "" where it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"no {missing[0]} here"
    try:
        with TwoHosts():
            return ""
    except OSError as error:
        return f"no network namespaces here: {error}"


class TwoHosts:
    """Host 0 at ADDRESSES[0] and host 1 at ADDRESSES[1]; a context manager. Raises OSError where that cannot be."""

    def __init__(self) -> None:
        self._names = [f"faults-{os.getpid()}-{uuid.uuid4().hex[:6]}-{host}" for host in range(2)]

    def __enter__(self) -> TwoHosts:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for name, address in zip(self._names, ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)

    def prefix(self, host: int) -> list[str]:
        """What to put before a command to run it there; the host is called host-0 or host-1."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host-{host}"]
        return ["ip", "netns", "exec", self._names[host], *named]

    def cut(self) -> None:
        """Pull the cable: packets between the hosts vanish, in both directions, and nobody is told."""
        _ip("-n", self._names[1], "link", "set", INTERFACE, "down")

    def join(self) -> None:
        """Put it back."""
        _ip("-n", self._names[1], "link", "set", INTERFACE, "up")


def launcher(host: int) -> list[str]:
    """Arguments of Python for torchrun with one rank on each of the two hosts."""
    return [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=run"),
        *(f"--rdzv_endpoint={ADDRESSES[0]}:29400", f"--rdzv_conf=is_host={1 - host}"),
        f"--local_addr={ADDRESSES[host]}",
    ]
