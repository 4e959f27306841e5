"""Ranks, devices and the process group: the only place of the project that calls init_process_group."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket, HashStore, Store, TCPStore
from torch.nn.parallel import DistributedDataParallel

from backbones import IMAGE_SIZE, Backbone
from backbones.recorded import without_trace
from configs.schema import ConfigError, TrainConfig
from training.ranks.lost import says_a_rank_is_lost
from training.ranks.meeting import MeetingError, meet
from training.ranks.monitor import NCCL_LATER_S, START_S, Monitor
from training.ranks.orphans import stop_with_launcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    store: Store
    monitor: Monitor = field(default_factory=Monitor)
    """Told where this rank is; watches it once it is entered."""
    timeout: float = 600
    """Seconds that collectives wait once training is under way."""
    launcher_store: Store | None = None
    """Torchrun's, where `store` is another: it outlives every rank, but not torchrun."""
    host_ranks: int = 0
    """Ranks of this host, which follow each other; 0: all are on one."""
    more_groups: list[dist.ProcessGroup] = field(default_factory=list)
    """Those that were made of some ranks."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. One collective."""
        dist.barrier(self.group)

    def begin_step(self, step: int) -> None:
        """Tell the monitor. From the second on, no rank may be late by more than `timeout`. No collective."""
        self.monitor.at(step, "training")
        self.monitor.steps += 1
        if self.monitor.steps == 2 and self.world_size > 1:
            for group in (self.group, *self.more_groups):
                dist.distributed_c10d._set_pg_timeout(_patience(self.timeout, self.device), group)

    def first_to_say(self, message: str) -> bool:
        """True on the first rank that asks about this message: an error that all ranks meet is printed once."""
        for store in (self.launcher_store, self.store):
            if store is not None:
                with contextlib.suppress(RuntimeError):  # it is gone, with torchrun, or with rank 0
                    return bool(store.add(f"said/{message}", 1) == 1)
        return True  # better twice than not at all


def is_restart() -> bool:
    """Whether torchrun has started the ranks anew after one of them failed (`--max-restarts`)."""
    return _environment("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _patience(timeout: float, device: torch.device) -> datetime.timedelta:
    return datetime.timedelta(seconds=timeout + (NCCL_LATER_S if device.type == "cuda" else 0))


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}: expected a whole number, got {text!r}") from None


def _device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus < local_world_size:
        raise ConfigError(
            f"train.device: cuda was asked for, but this host has {gpus} usable GPUs for {local_world_size} ranks: "
            "start fewer ranks, check the driver with nvidia-smi, or use --set train.device=cpu"
        )
    if wanted == "cpu" or gpus < local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def _why_no_group(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    where = f"process group (MASTER_ADDR {address}, MASTER_PORT {port})"
    if "EADDRINUSE" in str(error):
        return f"{where}: the port is in use: end what listens there (ss -ltnp), or choose another MASTER_PORT"
    if isinstance(error, dist.DistBackendError):  # its last line is the cause, the others say where NCCL was
        cause = "more shared memory (docker run --shm-size=1g)" if "/dev/shm" in str(error) else "NCCL_DEBUG=INFO"
        return f"{where}: {lines[-1]}: {cause}"
    return f"{where}: {lines[0]}: python -m training doctor looks for the cause"


def _record_flights(folder: Path) -> None:
    """Let NCCL write its last collectives into `folder` when one times out, unless the environment says otherwise."""
    with contextlib.suppress(OSError):  # a folder that cannot be written to is refused later, in words
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    former = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", former or str(folder / "rank_"))


def _meet_in_launchers_store(rank: int, world_size: int, timeout: datetime.timedelta) -> Store:
    address, port = os.environ.get("MASTER_ADDR", "localhost"), _environment("MASTER_PORT", 0)
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return meet(store, rank, world_size, timeout)


def _store_that_outlives_torchrun(store: Store, rank: int, timeout: datetime.timedelta) -> Store:
    """One that rank 0 keeps: ranks whose torchrun was killed can still agree on a last checkpoint."""
    key = "port of the store of rank 0"
    if rank == 0:
        kept = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        store.set(key, str(kept.port))
        return kept
    port = int(store.get(key))
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False, timeout=timeout)


@contextlib.contextmanager
def open_ranks(config: TrainConfig, *, flights: Path | None = None) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, or a group of one without torchrun.

    NCCL on GPUs, gloo on CPUs. CPU arithmetic gets `config.cpu_threads` threads, or this host's cores divided
    by its ranks. With `precision: fp32` GPUs convolve in float32, not in TF32. flights: folder for NCCL's flight
    recorder. Under torchrun this process ends with its launcher from here on. Raises ConfigError when CUDA is asked
    for and not there for every rank of this host, and when ranks do not come together: a port that is in use, an
    environment that lacks something, ranks that are missing, NCCL without shared memory. The group is closed at a
    clean end only: after an error the process is expected to end.
    """
    stop_with_launcher()
    rank, world_size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank, local_world_size = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
    device = _device(config.device, local_rank, local_world_size)
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
    arguments: dict[str, Any] = {"backend": "gloo", "timeout": _patience(max(config.timeout, START_S), device)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"  # by default convolutions round to 10 bits
        arguments |= {"backend": "nccl", "device_id": device}
        if flights is not None:
            _record_flights(flights)
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launched = torchrun and world_size > 1
    if world_size == 1 and (torchrun or "MASTER_ADDR" not in os.environ):
        # Torchrun's store would be gone for the last checkpoint where torchrun was killed.
        arguments |= {"store": HashStore(), "rank": 0, "world_size": 1}
    try:
        if launched:
            store = _meet_in_launchers_store(rank, world_size, arguments["timeout"])
            arguments |= {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(**arguments)
        if device.type == "cuda" and world_size > 1:
            dist.barrier()  # NCCL connects with the first collective: what it lacks shows now, and in one line
    except (dist.DistError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (
            isinstance(error, dist.DistError | MeetingError)
            or "connectFullMesh" in str(error)
            or says_a_rank_is_lost(error)
        ):
            raise
        raise ConfigError(_why_no_group(error)) from None
    store = kept = dist.distributed_c10d._get_default_store()
    if launched:
        kept = _store_that_outlives_torchrun(store, rank, arguments["timeout"])
    yield Ranks(
        rank=rank,
        world_size=world_size,
        device=device,
        group=dist.group.WORLD,  # type: ignore[arg-type]
        store=kept,
        launcher_store=store,
        timeout=config.timeout,
        host_ranks=local_world_size,
        monitor=Monitor(store, rank=rank, world_size=world_size, timeout=config.timeout, cuda=device.type == "cuda"),
    )
    if world_size > 1:
        try:
            dist.barrier()  # rank 0 may take the store with it
        except RuntimeError as error:
            if not says_a_rank_is_lost(error):  # all is done here
                raise
    # Not after an error: NCCL would wait here for ranks that sit in a collective, and torchrun for this process.
    dist.destroy_process_group()


def _sum_gradients(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda done: done.value()[0])


def data_parallel(backbone: Backbone, ranks: Ranks, *, compiled: bool = False) -> DistributedDataParallel:
    """The backbone on all ranks, its gradients *summed* over them.

    DDP averages by default. The losses here are means over the global batch and hand every rank the gradient
    of that global mean, so the sum is the gradient, and no hidden factor of the world size is needed anywhere.
    Of buffers (BatchNorm statistics) rank 0's count: evaluation (`training.verify.share_statistics`), checkpoints and
    exports take those. Weights become channels last in memory. Runs a forward and a backward pass on two black images,
    with their collectives. compiled: from then on, training runs its body through torch.compile; raises ConfigError
    where that does not work.
    """
    if compiled:
        _try_compiler(ranks.device)
    # As images come; gradients then have the layout of their buckets.
    backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = DistributedDataParallel(
        backbone,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
    )
    model.broadcast_buffers = False  # training does not read them; what does is given rank 0's
    # DDP refuses a hook whose annotations are text, as those of this file are; a lambda has none.
    model.register_comm_hook(ranks.group, lambda group, bucket: _sum_gradients(group, bucket))  # noqa: PLW0108
    # DDP lays its buckets out anew after its first backward, and the order of a sum over three or more ranks depends on
    # the layout: without this, the first step of a resumed run would round otherwise than that of one never stopped.
    pass_two_images(model, backbone, ranks.device)
    if compiled:  # not before: nobody waits for a program for two images
        backbone.compile_body()
    return model


def _try_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # what may be missing is of many kinds
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"model.compile: expected a torch.compile that works on {device.type}, got {said:.200}: install a C++ "
            "compiler (g++), or set it to false"
        ) from None


def pass_two_images(model: Callable[[Tensor], Tensor], backbone: Backbone, device: torch.device) -> None:
    """There and back, black ones; nothing else changes. model: the backbone as it is trained."""
    with without_trace(backbone, device):
        model(torch.zeros(2, 3, *IMAGE_SIZE, device=device)).sum().backward()
    backbone.zero_grad(set_to_none=True)


def host_groups(ranks: Ranks, inside: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """For ranks in blocks of `inside`: the group of this rank's place in every block, and that of its own block.

    All ranks call it, at the same time.
    """
    places = torch.tensor(dist.get_process_group_ranks(ranks.group)).view(-1, inside)
    patience = _patience(max(ranks.timeout, START_S), ranks.device)
    found: list[dist.ProcessGroup] = []
    for blocks in (places.T, places):
        mine: Any = None
        for block in blocks.tolist():  # each rank makes all of them, in the same order
            group = dist.new_group(block, timeout=patience)
            mine = group if dist.get_rank() in block else mine
        found.append(mine)
    ranks.more_groups.extend(found)
    return found[0], found[1]
