"""The head with `straight_through` gives the losses and gradients that insightface's gives, filter included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.schema import HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from tests.ranks import RankPool

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors"
RECORDED = {world: json.loads((VECTORS / f"partial_fc_v2_world{world}.json").read_text()) for world in (1, 2)}
NAMES = [case["name"] for case in RECORDED[1]["cases"]]


def _ours(group: dist.ProcessGroup, recorded: dict[str, Any], case: dict[str, Any]) -> tuple[float, Any, Any, int]:
    """By the rule in the fixture's README."""
    rank, world, batch, dim, classes = (
        dist.get_rank(group),
        *(recorded[k] for k in ("world", "batch", "dim", "classes")),
    )
    g = np.random.default_rng(21 + recorded["seed"])
    w_CD = 0.05 * g.standard_normal((classes, dim))
    x_WBD = g.standard_normal((world, batch, dim))
    labels_WB = g.integers(0, classes, (world, batch))
    x_WBD = x_WBD + 24 * w_CD[labels_WB]
    added = case["m3"] == 0
    config = HeadConfig(
        loss="arcface" if added else "cosface",
        margin=case["m2"] if added else case["m3"],
        scale=case["s"],
        straight_through=added,
        interclass_filter=case["filter"],
    )
    head = PartialFCHead(num_classes=classes, embedding_size=dim, config=config, group=group, seed=0)
    head.weight.data.copy_(torch.from_numpy(w_CD[head.shard.start : head.shard.stop]))
    x_BD = torch.from_numpy(x_WBD[rank]).float().requires_grad_()
    labels_B = torch.from_numpy(labels_WB[rank])
    loss = head(gather_batch(F.normalize(x_BD), labels_B, torch.arange(batch), group), step=0)
    loss.backward()
    assert x_BD.grad is not None
    assert head.weight.grad is not None
    return loss.item(), x_BD.grad.numpy(), head.weight.grad.numpy(), head.shard.start


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_peer(ranks: RankPool, name: str, world_size: int) -> None:
    recorded = RECORDED[world_size]
    (case,) = (case for case in recorded["cases"] if case["name"] == name)
    for (loss, grad_x, grad_w, start), theirs in zip(
        ranks.run(world_size, _ours, recorded, case), case["ranks"], strict=True
    ):
        assert loss == pytest.approx(theirs["loss"], rel=1e-5)
        assert start == theirs["class_start"]
        # Theirs are multiplied by the number of ranks, for DDP to divide again: ours are those of the global loss.
        for found, expected in ((grad_x * world_size, theirs["grad_x"]), (grad_w, theirs["grad_w"])):
            assert np.linalg.norm(found - np.array(expected)) < 1e-5 * np.linalg.norm(expected)
