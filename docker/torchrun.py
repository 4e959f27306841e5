"""A placement as arguments of torchrun (torch 2.13)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from docker.placement import LaunchError, Placement

MEET_S = 1800
"""Seconds that hosts wait for each other: the slowest may have to fetch the image."""
SAVE_S = 120
"""Seconds that ranks have for a last checkpoint before torchrun kills them, unless PET_SHUTDOWN_TIMEOUT says more."""
RESTARTS = 10
"""How often ranks are started anew where hosts come and go, unless PET_MAX_RESTARTS says more: those of the other hosts
fail when one leaves. That one joins takes none of them."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""torchrun's own, and the one that Slurm sends before the time is up, which would kill torchrun otherwise."""


def torchrun_arguments(environment: Mapping[str, str], place: Placement, *, gpus: int, address: str) -> list[str]:
    """Every option that says who meets whom, how, and for how long; further ones torchrun reads from PET_… itself.

    gpus: of this host. address: by which the other hosts reach this one, "" to let torchrun choose. Raises LaunchError.
    """
    restarts = environment.get("PET_MAX_RESTARTS") or str(RESTARTS if place.min_nodes != place.max_nodes else 0)
    if not restarts.isdecimal():
        raise LaunchError(f"PET_MAX_RESTARTS: expected a whole number, got {restarts!r}: correct it")
    patience = environment.get("PET_SHUTDOWN_TIMEOUT") or str(SAVE_S)
    if not patience.isdecimal():
        raise LaunchError(f"PET_SHUTDOWN_TIMEOUT: expected whole seconds, got {patience!r}: correct it")
    common = [
        f"--nproc-per-node={_ranks(environment.get('PET_NPROC_PER_NODE') or 'auto', gpus)}",
        f"--max-restarts={restarts}",
        f"--signals-to-handle={_SIGNALS}",
        f"--shutdown-timeout={patience}",
    ]
    if place.max_nodes == 1:
        return ["--standalone", *common]
    return [*_meeting(environment, place, changing=restarts != "0", address=address), *common]


def _meeting(environment: Mapping[str, str], place: Placement, *, changing: bool, address: str) -> list[str]:
    """How the hosts find each other.

    `static` puts the ranks in the order of the hosts and needs one port; it cannot meet a second time. `c10d` can, and
    takes it where hosts come and go or ranks are started anew; it orders hosts as it likes.
    """
    elastic = place.min_nodes != place.max_nodes
    backend = environment.get("PET_RDZV_BACKEND") or ("c10d" if elastic or changing else "static")
    if backend not in {"static", "c10d"}:
        raise LaunchError(f"PET_RDZV_BACKEND: expected static or c10d, got {backend!r}: leave it out, or correct it")
    if backend == "static" and (elastic or changing):
        raise LaunchError(
            "PET_RDZV_BACKEND: expected c10d, as hosts or ranks may start anew (PET_NNODES=MIN:MAX, PET_MAX_RESTARTS), "
            "got 'static': leave it out"
        )
    nodes = f"{place.min_nodes}:{place.max_nodes}" if elastic else str(place.max_nodes)
    found = [f"--nnodes={nodes}", f"--rdzv-backend={backend}", f"--rdzv-id={place.run_id}"]
    if backend == "static":
        if place.node_rank is None:
            raise LaunchError(
                "PET_NODE_RANK: expected this host's number, from 0, got nothing: set it, 0 on the host that "
                "MASTER_ADDR names"
            )
        found += [
            f"--node-rank={place.node_rank}",
            f"--master-addr={place.head}",
            f"--master-port={place.port}",
        ]
        settings = [f"timeout={MEET_S}"]
    else:
        found.append(f"--rdzv-endpoint={place.head}:{place.port}")
        settings = [f"join_timeout={MEET_S}"]
        if place.node_rank is not None:  # else torchrun compares names and addresses
            settings.append(f"is_host={int(place.node_rank == 0)}")
    if more := environment.get("PET_RDZV_CONF"):
        settings.append(more)
    found.append(f"--rdzv-conf={','.join(settings)}")
    return [*found, f"--local-addr={address}"] if address else found


def _ranks(wanted: str, gpus: int) -> str:
    """One rank for each GPU; without any, one: a rank takes all cores (`train.cpu_threads`)."""
    if wanted == "auto":
        return str(max(1, gpus))
    if wanted not in {"gpu", "cpu"} and not (wanted.isdecimal() and int(wanted) > 0):
        raise LaunchError(f"PET_NPROC_PER_NODE: expected a number of ranks, or auto, got {wanted!r}: correct it")
    return wanted


def count_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use. Parts of a GPU (MIG) are only counted where CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((place for place, name in enumerate(names) if name in {"", "-1"}), len(names))
    slurm = environment.get("SLURM_GPUS_ON_NODE", "")
    if slurm.isdecimal():
        return int(slurm)
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
