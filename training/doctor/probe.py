"""Run in processes of their own, as drivers and collectives may hang: `python -m training.doctor.probe gpus | group`.

gpus: prints the facts as JSON. group: a rank of a process group, by the environment, that adds up a number.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings

import torch
import torch.distributed as dist

from configs.schema import ConfigError, TrainConfig
from partial_fc.collectives import all_reduce_
from training.distributed import open_ranks
from training.doctor.gpus import Gpu, GpuFacts, driver


def _gpu(number: int) -> Gpu:
    about = torch.cuda.get_device_properties(number)
    free, error = 0, ""
    try:
        free, _ = torch.cuda.mem_get_info(number)
        ones = torch.ones(16, 16, device=f"cuda:{number}")
        if not bool((ones @ ones == 16).all()):
            error = "a small product came out wrong"
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    capability = (about.major, about.minor)
    return Gpu(name=about.name, capability=capability, free=free, total=about.total_memory, error=error)


def gpu_facts() -> GpuFacts:
    """What this process sees."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return GpuFacts(
        gpus=tuple(_gpu(number) for number in range(count)),
        cuda=torch.version.cuda or "",
        architectures=tuple(torch.cuda.get_arch_list()),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "",
        driver=driver(),
        warning=" ".join(str(caught[0].message).split())[:200] if caught else "",
    )


def join_group(device: str) -> str:
    """Join, add up 1 of each rank; what was found wrong. Raises ConfigError."""
    with open_ranks(TrainConfig(device="cuda" if device == "cuda" else "cpu", cpu_threads=1)) as ranks:
        total = float(all_reduce_(torch.ones(1024, device=ranks.device), ranks.group).mean())
    return "" if total == ranks.world_size else f"all-reduce: expected {ranks.world_size}, got {total}"


def main(arguments: list[str]) -> int:
    if arguments[0] == "gpus":
        print(json.dumps(dataclasses.asdict(gpu_facts())))
        return 0
    try:
        wrong = join_group(arguments[1])
    except (ConfigError, RuntimeError) as error:
        wrong = (str(error) or type(error).__name__).splitlines()[0]
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
