"""Ranks, devices and the process group: the only place of the project that calls init_process_group."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, HashStore, Store
from torch.nn.parallel import DistributedDataParallel

from backbones import IMAGE_SIZE
from configs.schema import ConfigError, TrainConfig

_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    store: Store

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. One collective."""
        dist.barrier(self.group)

    def first_to_say(self, message: str) -> bool:
        """True on the first rank that asks about this message: an error that all ranks meet is printed once."""
        try:
            return bool(self.store.add(f"said/{message}", 1) == 1)
        except RuntimeError:  # the rank that keeps the store has said it, and ended
            return False


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


@contextlib.contextmanager
def open_ranks(config: TrainConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, or a group of one without torchrun.

    NCCL on GPUs, gloo on CPUs. CPU arithmetic gets `config.cpu_threads` threads, or this host's cores divided
    by its ranks. With `precision: fp32` GPUs convolve in float32, not in TF32. Raises ConfigError when CUDA is asked
    for and not there for every rank of this host. The group is closed at a clean end only: after an error the process
    is expected to end.
    """
    rank, world_size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank, local_world_size = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
    device = _device(config.device, local_rank, local_world_size)
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
    arguments: dict[str, Any] = {"backend": "gloo", "timeout": _TIMEOUT}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"  # by default convolutions round to 10 bits
        arguments |= {"backend": "nccl", "device_id": device}
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        arguments |= {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**arguments)
    yield Ranks(
        rank=rank,
        world_size=world_size,
        device=device,
        group=dist.group.WORLD,  # type: ignore[arg-type]
        store=dist.distributed_c10d._get_default_store(),
    )
    # Not after an error: NCCL would wait here for ranks that sit in a collective, and torchrun for this process.
    dist.destroy_process_group()


def _sum_gradients(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda done: done.value()[0])


def data_parallel(backbone: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    """The backbone on all ranks, its gradients *summed* over them.

    DDP averages by default. The losses here are means over the global batch and hand every rank the gradient
    of that global mean, so the sum is the gradient, and no hidden factor of the world size is needed anywhere.
    Buffers (BatchNorm statistics) follow rank 0. Weights become channels last in memory. Runs a forward and a
    backward pass on two black images, with their collectives.
    """
    # As images come; gradients then have the layout of their buckets.
    backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = DistributedDataParallel(
        backbone,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
    )
    # DDP refuses a hook whose annotations are text, as those of this file are; a lambda has none.
    model.register_comm_hook(ranks.group, lambda group, bucket: _sum_gradients(group, bucket))  # noqa: PLW0108
    _settle_buckets(model, ranks.device)
    return model


def _settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Leave DDP's first backward behind, and everything else as it was.

    DDP lays its buckets out anew after its first backward, and the order of a sum over three or more ranks depends on
    the layout: without this, the first step of a resumed run would round otherwise than that of one never stopped.
    """
    before = [buffer.clone() for buffer in model.module.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model(torch.zeros(2, 3, *IMAGE_SIZE, device=device)).sum().backward()
    for buffer, old in zip(model.module.buffers(), before, strict=True):
        buffer.copy_(old)
    model.zero_grad(set_to_none=True)
