"""The host: versions, cores, shared memory, limits of a process. No check here needs the data."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from training.doctor.finding import Finding, size_text

_LEAST_PYTHON, _LEAST_TORCH = (3, 10), (2, 11)
_SHM_OF_RANK = 32 << 20
"""Shared memory that NCCL may take for a rank, a rule of thumb: its buffers are some 10 MB for each neighbour."""
_FILES_OF_RANK = 256
"""Files and sockets of a process besides those counted: libraries, logs, TensorBoard."""
_FILES_OF_PEER = 4
_THREADS_OF_RANK = 48
"""Of libraries: gloo, NCCL, CUDA, OpenMP, TensorBoard."""
UNLIMITED = 1 << 62


def versions(
    python: tuple[int, ...] = sys.version_info[:3], torch_version: str = torch.__version__
) -> Iterator[Finding]:
    """Python and torch against the least that setup.py asks for."""
    for name, found, least in (
        ("python", python, _LEAST_PYTHON),
        ("torch", tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2]), _LEAST_TORCH),
    ):
        text = torch_version if name == "torch" else ".".join(map(str, found))
        if found >= least:
            yield Finding(name, "pass", text)
        else:
            wanted = ".".join(map(str, least))
            yield Finding(name, "fail", f"expected {wanted} or newer, found {text}", "make the environment anew")


def cores_here() -> float:
    """Cores that this process may use: its affinity, and what a container's quota leaves of it."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _line("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) / int(period))
    return cores


def cores(found: float, local_ranks: int, threads: int) -> Finding:
    """Cores against ranks and their decoding threads. threads: `data.threads`, of each rank."""
    wanted = local_ranks * (threads + 1)
    text = f"{found:g} cores for {local_ranks} rank(s), each with {threads} decoding thread(s)"
    if found >= wanted:
        return Finding("cores", "pass", text)
    fitting = max(1, int(found / local_ranks) - 1)
    cure = f"--set data.threads={fitting}, or more cores" if fitting < threads else "fewer ranks, or more cores"
    return Finding("cores", "warn", f"expected {wanted}, found {text}: they wait for each other", cure)


def shared_memory(free: int | None, local_ranks: int, *, nccl: bool) -> Finding:
    """/dev/shm. free: bytes; None where there is none. The loaders decode in threads and use none of it."""
    name, loader = "shared memory", "our loaders use none"
    found = "no /dev/shm" if free is None else f"{size_text(free)} free in /dev/shm"
    if not nccl or local_ranks == 1:
        return Finding(name, "pass", f"{found}; {loader}, and neither do ranks here")
    wanted = _SHM_OF_RANK * local_ranks
    if free is not None and free >= wanted:
        return Finding(name, "pass", f"{found}, for NCCL; {loader}")
    text = (
        f"expected {size_text(wanted)} for NCCL between {local_ranks} ranks, where GPUs do not reach each other "
        f"directly, found {found}"
    )
    cure = "docker run --shm-size=1g (or --ipc=host); in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return Finding(name, "fail" if (free or 0) < _SHM_OF_RANK else "warn", text, cure)


def shared_memory_here(path: str = "/dev/shm") -> int | None:
    """Free bytes of it; None where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def open_files(limit: int, *, ranks: int, record_files: int, threads: int) -> Finding:
    """Limit of open files of a process, against what a rank opens."""
    wanted = _FILES_OF_RANK + _FILES_OF_PEER * ranks + 2 * record_files + threads
    if limit >= wanted:
        return Finding("open files", "pass", f"limit {_limit(limit)}, a rank opens about {wanted}")
    cure = f"ulimit -n {max(4096, wanted)}; docker run --ulimit nofile=…; LimitNOFILE of a service"
    return Finding("open files", "fail", f"expected a limit of {wanted} or more, found {limit}", cure)


def processes(limit: int, *, local_ranks: int, threads: int) -> Finding:
    """Limit of processes and threads of a user, against those of the ranks of a host."""
    wanted = local_ranks * (_THREADS_OF_RANK + threads)
    if limit >= wanted:
        return Finding("processes", "pass", f"limit {_limit(limit)}, the ranks make about {wanted} threads")
    cure = f"ulimit -u {max(4096, wanted)}; docker run --pids-limit=…"
    return Finding("processes", "fail", f"expected a limit of {wanted} threads or more, found {limit}", cure)


def locked_memory(limit: int) -> Finding:
    """Locked memory, for information: Ethernet and GPUs of one host need none."""
    found = "unlimited" if limit >= UNLIMITED else size_text(limit)
    hint = "" if limit >= UNLIMITED else "; InfiniBand wants it unlimited (ulimit -l)"
    return Finding("locked memory", "pass", f"{found}{hint}")


def soft_limit(kind: int) -> int:
    """Soft limit, `UNLIMITED` where there is none. kind: a RLIMIT_ constant of `resource`."""
    soft, _ = resource.getrlimit(kind)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def process_limit() -> int:
    """Of the user, and of the container; root is held by the container's alone."""
    limit = UNLIMITED if os.geteuid() == 0 else soft_limit(resource.RLIMIT_NPROC)
    most = _line("/sys/fs/cgroup/pids.max")
    return min(limit, int(most)) if most.isdigit() else limit


def memory_here() -> int:
    """Bytes of memory that the host, and its container's limit, have left."""
    available = UNLIMITED
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    most, used = _line("/sys/fs/cgroup/memory.max"), _line("/sys/fs/cgroup/memory.current")
    if most.isdigit() and used.isdigit():
        available = min(available, max(0, int(most) - int(used)))
    return available


def _limit(limit: int) -> str:
    return "none" if limit >= UNLIMITED else str(limit)


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
