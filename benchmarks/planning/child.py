"""One configuration of the planner's benchmark, in a process of its own: memory at its peak, and time of a step.

A training step as a run takes it, of random images: backbone under DDP, head, cluster service if it is on, both
optimizers. One thread, and its CPU time: other work on the same cores then shows little. Before every timed step small
pieces of work are timed in the same way (`training.plan.machine`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from backbones import IMAGE_SIZE, build_backbone
from clustering.service.service import ClusterService
from configs.load import load_config
from configs.schema import RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks, data_parallel, open_ranks
from training.optim import build_optimizers
from training.plan.machine import measure
from training.step import TrainStep

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FILLED_AT_ONCE = 4096
_JUMP = 25


def memory_of(case: Mapping[str, Any]) -> dict[str, int]:
    """`held` and `peak` in bytes. case: `settings` as of --set, `classes`, `samples`. RuntimeError if a process fails.

    Memory that is freed goes back to the system at once: that shows what is in use, but costs time
    (benchmarks.measuring.memory).
    """
    found: dict[str, int] = _in_own_process(case, what="memory", MALLOC_MMAP_THRESHOLD_="65536")
    return found


def time_of(case: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """`seconds` of every step, and `reference`: the medians of `machine.measure` between them."""
    return _in_own_process({**case, "steps": steps}, what="time")


def _in_own_process(case: Mapping[str, Any], *, what: str, **environment: str) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning.child", json.dumps({**case, "what": what})],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if child.returncode:
        raise RuntimeError(f"{case['settings']}: exit code {child.returncode}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def _resident(mark: str) -> int:
    """VmRSS, or VmHWM, the highest since `_forget`."""
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(mark))
    return 1024 * int(line.split()[1])


def _forget() -> None:
    _CLEAR.write_text("5", encoding="ascii")


class _Run:
    def __init__(self, config: RunConfig, classes: int, samples: int, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self.config, self.ranks = config, ranks
        D = config.model.embedding_size
        self.labels_I = torch.from_numpy(np.arange(samples, dtype=np.int64) % classes)
        self.steps_per_epoch = samples // config.train.batch_size
        backbone = build_backbone(config.model.backbone, embedding_size=D, recompute=config.model.recompute)
        head = PartialFCHead(num_classes=classes, embedding_size=D, config=config.head, group=ranks.group, seed=0)
        self.service = None
        if config.clustering.enabled:
            self.service = ClusterService(
                labels=self.labels_I.numpy(),
                num_classes=classes,
                dim=D,
                group=ranks.group,
                device=ranks.device,
                config=config.clustering,
                margin=config.head.margin,
                total_steps=self.steps_per_epoch * config.train.epochs,
                steps_per_epoch=self.steps_per_epoch,
            )
        model = data_parallel(backbone, ranks)
        self.train_step = TrainStep(
            backbone=model,
            head=head,
            service=self.service,
            optimizers=build_optimizers(model.parameters(), head.parameters(), config.optim, config.head, seed=0),
            config=config,
            device=ranks.device,
        )
        self.step = 0

    def take_step(self) -> float:
        """Seconds of CPU time."""
        B = self.config.train.batch_size
        batches = []
        for micro in range(self.config.train.accumulation):
            generator = torch.Generator().manual_seed(1000 * self.step + micro)
            ids_B = torch.randint(0, len(self.labels_I), (B,), generator=generator)
            pixels = torch.randint(0, 256, (B, *IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
            batches.append(Batch(pixels.permute(0, 3, 1, 2), self.labels_I[ids_B], ids_B))
        began = time.process_time()
        self.train_step(batches, step=self.step, lr=1e-4)
        self.step += 1
        return time.process_time() - began

    def fill(self) -> None:
        """The bank, with rows like faces', and the first version of the clusters; the second refresh begins."""
        service = self.service
        assert service is not None
        D = self.config.model.embedding_size
        person_CD = F.normalize(torch.randn(int(self.labels_I.max()) + 1, D))
        for ids_n in torch.arange(len(self.labels_I)).split(_FILLED_AT_ONCE):
            labels_n = self.labels_I[ids_n]
            x_nD = F.normalize(person_CD[labels_n] + torch.randn(len(ids_n), D) * (0.65**-2 - 1) ** 0.5 / D**0.5)
            service.observe(GatheredBatch(x_nD, labels_n, ids_n, self.ranks.group))
        step = self.steps_per_epoch - 1
        service.advance(step)
        while service.version == 0:
            step += _JUMP
            service.advance(step)
        self.step = 2 * self.steps_per_epoch
        service.advance(self.step - 1)

    def end_refresh(self) -> None:
        service = self.service
        assert service is not None
        step = self.step
        while service.version == 1:
            step += _JUMP
            service.advance(step)


def _memory(run: _Run, before: int) -> dict[str, int]:
    """Bytes over `before`: after a step, and at the peak of steps and of a whole refresh."""
    run.take_step()  # makes the momentum
    _forget()
    run.take_step()
    held = _resident("VmRSS") - before
    if run.service is not None:
        run.end_refresh()
    return {"held": held, "peak": _resident("VmHWM") - before}


def _time(run: _Run, steps: int) -> dict[str, Any]:
    """CPU seconds of every step, and the medians of small pieces of work that were timed between them."""
    run.take_step()
    references, seconds = [], []
    for _ in range(steps):
        references.append(measure(1, time.process_time))
        seconds.append(run.take_step())
    medians = {name: statistics.median(one[name] for one in references) for name in references[0]}
    return {"seconds": seconds, "reference": medians}


def main() -> None:
    case = json.loads(sys.argv[1])
    config = load_config(None, [*case["settings"], "train.device=cpu", "train.cpu_threads=1"])
    with open_ranks(TrainConfig(device="cpu", cpu_threads=1)) as ranks:
        measure(1)  # libraries come now
        before = _resident("VmRSS")
        run = _Run(config, case["classes"], case["samples"], ranks)
        if run.service is not None:
            run.fill()
        found = _memory(run, before) if case["what"] == "memory" else _time(run, case["steps"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
