"""Collectives of a training step, counted where torch dispatches them, against the formula of `training.traffic`."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import build_backbone
from configs.schema import HeadConfig, ModelConfig, RunConfig
from tests.dist.fsdp_cases import PER_EPOCH, Run, batches, network
from tests.ranks import RankPool
from training.sharded import ShardedBackbone
from training.stopping import Signals, StopRequest
from training.traffic import step_traffic

KINDS = {
    "_allgather_base_": "all_gather",
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
Counts = dict[tuple[str, int], tuple[int, int]]
"""By kind and ranks of the group: calls and bytes."""


class Recorder(TorchDispatchMode):
    """Every collective of this process; one of a kind that is not known is an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            (group,) = [
                dist.ProcessGroup.unbox(argument)
                for argument in args
                if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())  # type: ignore[no-untyped-call]
            ]
            key = KINDS[func.__name__.partition(".")[0]], group.size()
            self.calls[key] += 1
            self.bytes[key] += max(_bytes(argument) for argument in args)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def _step(group: dist.ProcessGroup, settings: dict[str, Any]) -> tuple[Counts, Counts]:
    """What a step ran, and what it should have."""
    run = Run(group, **settings)
    first = 2 * PER_EPOCH if run.service is not None else 1
    run.steps(0, first)
    if run.service is not None:
        assert run.service.version > 0, "or there is no contrastive loss"
        mock.patch.object(run.service, "advance").start()  # refreshes come on top
    if isinstance(run.backbone, ShardedBackbone):
        with run.backbone.gathered():  # an evaluation in between changes nothing
            pass
    stop = StopRequest(run.ranks, Signals())
    micro_batches = batches(run.ranks.rank, run.ranks.world_size, run.config.train.accumulation, first)
    with Recorder() as recorder:
        run.train_step(micro_batches, step=first, lr=0.01)
        stop.due()
    among_several = [key for key in recorder.calls if key[1] > 1]  # DDP runs some among one, which send nothing
    told: Counts = {key: (recorder.calls[key], recorder.bytes[key]) for key in among_several}
    wanted: Counts = {}
    whole = network(settings.get("net", "blocks"))
    for c in step_traffic(run.config, whole, ranks=run.ranks.world_size, host_ranks=run.ranks.host_ranks):
        calls, nbytes = wanted.get((c.kind, c.ranks), (0, 0))
        wanted[c.kind, c.ranks] = calls + c.times, nbytes + c.bytes
    return told, wanted


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 wire": {"head": HeadConfig(scale=16.0, wire_dtype="bf16")},
    "curricularface, accumulated": {"head": HeadConfig(scale=16.0, loss="curricularface"), "accumulation": 2},
    "clusters": {"clusters": True},
    "several buckets": {"net": "vit"},
    "sharded": {"net": "vit", "shard": "all"},
    "sharded, accumulated": {"shard": "all", "accumulation": 2},
    "sharded by hosts, bf16 wire, accumulated, recomputed": {
        "shard": "host",
        "host_ranks": 2,
        "head": HeadConfig(scale=16.0, wire_dtype="bf16"),
        "accumulation": 2,
        "recompute": 1.0,
    },
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_the_formula_says(ranks: RankPool, world_size: int, case: str) -> None:
    for told, wanted in ranks.run(world_size, _step, CASES[case]):
        assert told == wanted != {}


def test_a_step_of_one_rank_sends_nothing(ranks: RankPool) -> None:
    assert ranks.run(1, _step, CASES["sharded, accumulated"]) == [({}, {})]


def test_the_table_of_the_architecture() -> None:
    """Its formulas, of 128 images on each of 8 ranks."""
    with torch.device("meta"):
        backbone = build_backbone("iresnet18")
    N, D, P = 8 * 128, 512, sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    found = {c.what: c for c in step_traffic(RunConfig(), backbone, ranks=8)}
    assert {what: c.bytes for what, c in found.items()} == {
        "embeddings, lengths, labels, ids": N * (4 * D + 20),
        "sums of the softmax": 16 * N,
        "sums of the contrastive loss": 8 * N,
        "alignment loss": 4,
        "gradients of embeddings and lengths": 4 * N * (D + 1),
        "gradients of the backbone": 4 * P,
        "whether to stop": 4,
    }
    assert found["sums of the softmax"].sent == 2 * 16 * N * 7 / 8
    config = RunConfig(head=HeadConfig(wire_dtype="bf16"), model=ModelConfig(shard="host"))
    cut = {c.what: c for c in step_traffic(config, backbone, ranks=8, host_ranks=4)}
    assert cut["embeddings, lengths, labels, ids"].bytes == N * (2 * D + 20)
    assert (cut["gradients of embeddings and lengths"].kind, cut["gradients of embeddings and lengths"].bytes) == (
        "all_to_all",
        N * (2 * D + 4),
    )
    assert cut["gradients over hosts"].bytes == cut["gradients of the backbone"].bytes / 4 >= P
