"""A run of several steps on 1, 2 and 4 ranks: the same classes drawn, the same losses, the same centres at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.head import HeadConfig
from partial_fc.deferred import deferred
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreAdamW, CentreSGD
from tests.ranks import RankPool

CLASSES, DIM, ROWS, STEPS = 3001, 16, 24, 5  # shards that end within a block of the sampling
SETTINGS: dict[str, dict[str, Any]] = {
    "all classes": {},
    "sampled": {"sample_rate": 0.1},
    "sampled, sub-centres": {"sample_rate": 0.1, "subcentres": 2},
    "sampled, adaface": {"sample_rate": 0.1, "loss": "adaface", "margin": 0.4},
    "sampled, curricularface": {"sample_rate": 0.1, "loss": "curricularface"},
    "sampled, catching up": {"sample_rate": 0.1, "missed_steps": "catch_up"},
    "sampled, on the sphere": {"sample_rate": 0.1, "on_sphere": True},
    "bf16 wire": {"wire_dtype": "bf16", "sample_rate": 0.1},
}


def _run(
    group: dist.ProcessGroup, settings: dict[str, Any], name: str
) -> tuple[list[float], list[list[int]], Tensor, Tensor]:
    """Losses, sampled classes of each step, centres at the end, this rank's embeddings' gradient of the last step."""
    head = PartialFCHead(
        num_classes=CLASSES, embedding_size=DIM, config=HeadConfig(scale=24.0, **settings), group=group, seed=3
    )
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        catch_up = head.config.missed_steps == "catch_up"
        optimizer = CentreSGD(
            head.parameters(),
            lr=0.2,
            momentum=0.9,
            weight_decay=1e-3,
            on_sphere=head.config.on_sphere,
            catch_up=catch_up,
        )
    else:
        optimizer = CentreAdamW(
            head.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=1e-3, on_sphere=head.config.on_sphere
        )
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    losses, drawn = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x_ND = torch.randn(ROWS, DIM, generator=generator) * 3
        labels_N = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        hard_M = torch.randint(0, CLASSES, (7,), generator=generator)
        x_BD = x_ND[mine].requires_grad_()
        batch = head.gather(x_BD, labels_N[mine], labels_N[mine])
        loss = head(batch, step=step, hard_classes_M=hard_M)
        loss.backward()
        (gradient,) = deferred(head.weight) or []
        classes: list[int] = []
        if gradient.sampled is not None:
            classes = (gradient.sampled.trimmed(head.shard.size) + head.shard.start).tolist()
            assert {y for y in hard_M.tolist() if head.shard.start <= y < head.shard.stop} <= set(classes)
        drawn.append(classes)
        optimizer.step()
        losses.append(loss.item())
    if isinstance(optimizer, CentreSGD):
        optimizer.settle()
    assert x_BD.grad is not None
    return losses, drawn, head.weight.detach(), x_BD.grad


@pytest.mark.parametrize(
    ("setting", "name"),
    [(s, name) for s in SETTINGS for name in ("sgd", "adamw") if (s, name) != ("sampled, catching up", "adamw")],
)
def test_the_number_of_ranks_does_not_matter(ranks: RankPool, setting: str, name: str) -> None:
    settings = SETTINGS[setting]
    alone = ranks.run(1, _run, settings, name)[0]
    close = 1e-2 if "wire_dtype" in settings else 1e-5  # in bf16 each rank rounds its share of a gradient
    for world_size in (2, 4):
        parts = ranks.run(world_size, _run, settings, name)
        for part in parts:
            assert part[0] == pytest.approx(alone[0], rel=1e-5)
        for step in range(STEPS):
            together = [y for part in parts for y in part[1][step]]
            assert together == alone[1][step], "the same classes, in order"
        centres, gradient = (torch.cat([part[i] for part in parts]) for i in (2, 3))
        assert float((centres - alone[2]).norm() / alone[2].norm()) < 1e-5
        assert float((gradient - alone[3]).norm() / alone[3].norm()) < close


def _bf16(group: dist.ProcessGroup) -> Tensor:
    head = PartialFCHead(
        num_classes=CLASSES, embedding_size=DIM, config=HeadConfig(centre_dtype="bf16"), group=group, seed=3
    )
    optimizer = CentreSGD(head.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    x_ND = F.normalize(torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    labels_B = torch.arange(ROWS)[mine] * 100
    head(head.gather(x_ND[mine].requires_grad_(), labels_B, labels_B), step=0).backward()
    optimizer.step()
    return head.weight.detach()


def test_bf16_centres_are_rounded_alike_whatever_the_ranks(ranks: RankPool) -> None:
    """The lots go by class. A sum in another order may tip a number that lies at the edge of its lot."""
    alone = ranks.run(1, _bf16)[0]
    for world_size in (2, 4):
        together = torch.cat(ranks.run(world_size, _bf16))
        assert float((together == alone).double().mean()) > 0.999
