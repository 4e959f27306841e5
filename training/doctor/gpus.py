"""GPUs: how many, of which kind, whether this torch can use them. Facts come from a process of their own (`probe`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.doctor.finding import Finding, size_text

_BF16 = (8, 0)
"""Compute capability from which on GPUs multiply bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as torch sees it."""

    name: str
    capability: tuple[int, int]
    free: int
    """Bytes."""
    total: int
    error: str = ""
    """Why a small product on it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """GPUs of a host, and what torch was built for."""

    gpus: tuple[Gpu, ...]
    cuda: str = ""
    """CUDA version of the torch build; empty: built without."""
    architectures: tuple[str, ...] = ()
    """`sm_90`, `compute_90`: machine code, and code that a driver compiles."""
    nccl: str = ""
    driver: str = ""
    """Version of the kernel module; empty: none is loaded."""
    warning: str = ""
    """What torch said when it looked for GPUs."""


def driver() -> str:
    """Version of the kernel module; empty: none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", text)
    return found[1] if found else "of unknown version"


def will_use(facts: GpuFacts, device: str, local_ranks: int) -> bool:
    """Whether a run trains on GPUs, as `training.distributed` decides. device: `train.device`."""
    return device != "cpu" and len(facts.gpus) >= local_ranks


def gpus(facts: GpuFacts, *, device: str, local_ranks: int, precision: str) -> Iterator[Finding]:
    """Everything about them. device, precision: settings of `train`; local_ranks: of this host."""
    build = f"torch built for CUDA {facts.cuda}" if facts.cuda else "torch built without CUDA"
    driver = f"driver {facts.driver}" if facts.driver else "no NVIDIA driver"
    count = len(facts.gpus)
    if device == "cpu":
        yield Finding("GPUs", "pass", f"train.device=cpu: {count} GPUs are not used")
        return
    if count < local_ranks:
        yield _too_few(facts, device, local_ranks, f"{driver}, {build}")
        if not count or device == "auto":
            return
    else:
        kinds = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
        idle = f"; {count - local_ranks} without a rank" if count > local_ranks else ""
        cure = "start a rank for each GPU" if idle else ""
        yield Finding("GPUs", "warn" if idle else "pass", f"{count} x {kinds}; {driver}, {build}{idle}", cure)
    used = facts.gpus[:local_ranks]
    if len({gpu.name for gpu in used}) > 1:
        yield Finding("GPU kinds", "warn", "expected GPUs of one kind, the slowest sets the pace", "choose by "
                      "CUDA_VISIBLE_DEVICES")  # fmt: skip
    yield from _usable(facts, used)
    yield _precision(used, precision)
    yield from _shared(used)


def _too_few(facts: GpuFacts, device: str, local_ranks: int, what: str) -> Finding:
    found = f"found {len(facts.gpus)} usable GPUs for {local_ranks} rank(s) of this host ({what})"
    said = f"; torch says: {facts.warning}" if facts.warning else ""
    if not facts.cuda:
        cure = "install a torch with CUDA, or --set train.device=cpu"
    elif not facts.driver:
        cure = "load the driver, or give the container its GPUs (docker run --gpus all)"
    else:
        cure = "start fewer ranks, or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    if device == "cuda":
        return Finding("GPUs", "fail", f"train.device=cuda: {found}{said}", cure)
    return Finding("GPUs", "warn", f"{found}{said}: the run would train on CPUs", cure)


def _usable(facts: GpuFacts, used: tuple[Gpu, ...]) -> Iterator[Finding]:
    bad = [f"GPU {number}: {gpu.error}" for number, gpu in enumerate(used) if gpu.error]
    lacking = {gpu.capability for gpu in used if not has_kernels(gpu.capability, facts.architectures)}
    if lacking:
        found = ", ".join("sm_" + "".join(map(str, capability)) for capability in sorted(lacking))
        text = f"expected kernels for {found}, this torch has {' '.join(facts.architectures) or 'none'}"
        yield Finding("GPU kernels", "fail", text, "install a torch built for this GPU")
    elif bad:
        cure = "look at nvidia-smi: another process may have it for itself, or it needs a reset"
        yield Finding("GPU kernels", "fail", "; ".join(bad), cure)
    else:
        yield Finding("GPU kernels", "pass", "this torch has kernels for them, and a small product came out right")


def has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Machine code of the same major version, or older code that the driver compiles."""
    for architecture in architectures:
        if match := re.match(r"(sm|compute)_(\d+)(\d)", architecture):
            version = int(match[2]), int(match[3])
            if version <= capability and (match[1] == "compute" or version[0] == capability[0]):
                return True
    return False


def _precision(used: tuple[Gpu, ...], precision: str) -> Finding:
    name = "precision"
    if precision == "bf16" and any(gpu.capability < _BF16 for gpu in used):
        text = "train.precision=bf16: expected GPUs of compute capability 8.0 or more, older ones only emulate it"
        return Finding(name, "warn", text, "--set train.precision=fp16, or fp32")
    return Finding(name, "pass", f"train.precision={precision}")


def _shared(used: tuple[Gpu, ...]) -> Iterator[Finding]:
    """Whether other processes hold memory."""
    for number, gpu in enumerate(used):
        if gpu.free < 0.9 * gpu.total:
            text = f"expected GPU {number} to be free, found {size_text(gpu.free)} of {size_text(gpu.total)}"
            yield Finding("GPU memory", "warn", text, "end what else runs on it (nvidia-smi)")


def nccl(facts: GpuFacts, *, on_gpus: bool) -> Finding:
    """The library by which ranks talk."""
    if not on_gpus:
        return Finding("collectives", "pass", "gloo, as ranks train on CPUs")
    if facts.nccl:
        return Finding("collectives", "pass", f"NCCL {facts.nccl}")
    return Finding("collectives", "fail", "expected NCCL, this torch is built without", "install a torch with CUDA")
