"""Short trainings of small networks, sharded or not, as `test_fsdp*.py` and `test_traffic.py` compare them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import Backbone
from backbones.recompute import Part, recompute
from backbones.small import SmallNet
from backbones.vit import VisionTransformer
from clustering.service.service import ClusterService
from configs.schema import ClusteringConfig, HeadConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from tests.ranks import ranks_of
from training.building import on_all_ranks
from training.optim import build_optimizers
from training.run_state import RunState
from training.sharded import ShardedBackbone
from training.step import TrainStep

CPU = torch.device("cpu")
CLASSES, GLOBAL, D, PER_EPOCH = 10, 16, 6, 3
LABELS = np.arange(GLOBAL * PER_EPOCH) % CLASSES
LR = 0.05


class Blocks(Backbone):
    """Without BatchNorm, so that any number of ranks trains the same; rows are not shared out evenly."""

    def __init__(self) -> None:
        super().__init__(embedding_size=D)
        self.first = nn.Conv2d(3, 5, 16, stride=16)
        self.blocks = nn.ModuleList(nn.Conv2d(5, 5, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(5 * 49, D)
        self.gain = nn.Parameter(torch.ones(D), requires_grad=False)  # as IResNet's last BatchNorm has one

    def body(self, images_B3HW: Tensor) -> Tensor:
        x = self.first(images_B3HW)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x

    def parts(self) -> list[Part]:
        return [Part(block) for block in self.blocks]

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.last(features_BCHW.flatten(1)) * self.gain


def network(name: str, share: float = 0.0) -> Backbone:
    """share: of the blocks that are computed again."""
    torch.manual_seed(5)
    if name == "blocks":
        net: Backbone = Blocks()
    elif name == "small":  # with BatchNorm, channels last
        net = SmallNet(embedding_size=D)
    else:  # blocks, and a linear layer that is gathered on its own; masked patches are drawn
        net = VisionTransformer(96, 2, embedding_size=D, drop_path=0.2, mask_ratio=0.1)
    recompute(net.parts(), share)
    return net


def batches(rank: int, world_size: int, accumulation: int, step: int) -> list[Batch]:
    """The rank's part of a global batch, in micro-batches; the same images for any number of ranks."""
    number = step % PER_EPOCH
    images = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (GLOBAL, 112, 112, 3), dtype=np.uint8))
    size = GLOBAL // accumulation // world_size
    found = []
    for micro in range(accumulation):
        start = micro * GLOBAL // accumulation + rank * size
        rows = torch.arange(start, start + size)
        ids = rows + GLOBAL * number
        found.append(Batch(images[rows].permute(0, 3, 1, 2), torch.from_numpy(LABELS)[ids], ids))
    return found


class Run:
    """A backbone, a head and their optimizers on the ranks of a group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        net: str = "blocks",
        shard: str = "none",
        host_ranks: int = 0,
        optimizer: str = "sgd",
        precision: str = "fp32",
        recompute: float = 0.0,
        head: HeadConfig | None = None,
        clusters: bool = False,
        accumulation: int = 1,
    ) -> None:
        self.ranks = dataclasses.replace(ranks_of(group), host_ranks=host_ranks)
        self.config = RunConfig(
            model=ModelConfig(shard=shard, embedding_size=D),  # type: ignore[arg-type]
            head=head or HeadConfig(scale=16.0),
            clustering=ClusteringConfig(
                enabled=clusters, warmup_fraction=0.0, ramp_fraction=0.0, refresh_span=0.3, refresh_epochs=1.0
            ),
            optim=OptimConfig(name=optimizer, lr=LR, reference_batch=0, clip_norm=1.0),  # type: ignore[arg-type]
            train=TrainConfig(
                precision=precision,
                batch_size=GLOBAL // accumulation // self.ranks.world_size,
                accumulation=accumulation,
            ),  # type: ignore[arg-type]
        )
        self.whole = network(net, recompute)
        torch.manual_seed(100 + self.ranks.rank)
        self.backbone = on_all_ranks(self.whole, self.config.model, self.ranks)
        self.head = PartialFCHead(num_classes=CLASSES, embedding_size=D, config=self.config.head, group=group, seed=1)
        self.optimizers = build_optimizers(
            self.backbone.parameters(), self.head.parameters(), self.config.optim, self.config.head, seed=0
        )
        self.service: ClusterService | None = None
        if clusters:
            self.service = ClusterService(
                labels=LABELS,
                num_classes=CLASSES,
                dim=D,
                group=group,
                device=CPU,
                config=self.config.clustering,
                margin=self.config.head.margin,
                total_steps=20,
                steps_per_epoch=PER_EPOCH,
                bank_dtype=torch.float32,
            )
        self.train_step = TrainStep(
            backbone=self.backbone,
            head=self.head,
            service=self.service,
            optimizers=self.optimizers,
            config=self.config,
            device=CPU,
        )
        sharded = isinstance(self.backbone, ShardedBackbone)
        if self.train_step.loss_scale is not None:
            self.train_step.loss_scale.factor.fill_(64.0)  # or the first steps would be skipped to find it
        self.state = RunState(
            backbone=self.backbone if sharded else self.backbone.module,
            head=self.head,
            optimizers=self.optimizers,
            service=None,
            ranks=self.ranks,
            seed=1,
        )

    def steps(self, first: int, last: int) -> list[list[float]]:
        """Loss and gradient norms of each step."""
        found = []
        for step in range(first, last):
            parts = batches(self.ranks.rank, self.ranks.world_size, self.config.train.accumulation, step)
            values = self.train_step(parts, step=step, lr=LR)
            found.append([values.total.item(), values.gradient_norm.item(), *values.norms_P.tolist()])
        return found

    def weights(self) -> dict[str, Tensor]:
        """Whole, on every rank."""
        if not isinstance(self.backbone, ShardedBackbone):
            return {name: tensor.clone() for name, tensor in self.whole.state_dict().items()}
        with self.backbone.gathered() as whole:
            tensors = {**dict(whole.named_parameters()), **self.backbone.uncut()}
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
