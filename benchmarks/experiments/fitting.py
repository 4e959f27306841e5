"""One training, by the project's own head, cluster service and optimizers, in this process.

Legend: N samples, B rows of a batch, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.experiments.nets import Net
from benchmarks.experiments.placebo import service_of
from clustering.service.service import ClusterService
from configs.head import HeadConfig
from configs.schema import ClusteringConfig, OptimConfig
from partial_fc.head import PartialFCHead
from training.optim import build_optimizers, learning_rate, set_learning_rate

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings of a training."""

    epochs: int = 12
    batch: int = 256
    head: HeadConfig = field(default_factory=lambda: HeadConfig(scale=24.0))
    clustering: ClusteringConfig | None = None
    placebo: str = ""
    """A name of `placebo.PLACEBOS`: what is shuffled."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=0.01, reference_batch=0, warmup_epochs=1))
    """The rate is the one of 0.005, 0.01, 0.03 and 0.1 at which plain ArcFace did best (docs/experiments.md)."""


@dataclass(frozen=True, slots=True)
class Fitted:
    loss_by_epoch: list[float]
    """Of the margin softmax."""
    service: ClusterService | None


def own_group() -> dist.ProcessGroup:
    """A group of this process alone: an experiment's run is one rank."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def fit(
    net: Net,
    x: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    recipe: Recipe,
    augment: Augment,
    seed: int,
) -> Fitted:
    """Train `net` in place. x: (N, ...). labels: int64 (N,). augment: what becomes of a batch of x. Deterministic."""
    group = own_group()
    torch.manual_seed(seed)  # dropout
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    draw = torch.Generator().manual_seed(seed)
    D = net.embedding_size
    head = PartialFCHead(num_classes=num_classes, embedding_size=D, config=recipe.head, group=group, seed=seed)
    optimizers = build_optimizers(net.parameters(), head.parameters(), recipe.optim, recipe.head, seed=seed)
    steps = len(x) // recipe.batch
    if steps == 0:
        raise ValueError(f"expected at least {recipe.batch} samples, a batch, got {len(x)}")
    total = steps * recipe.epochs
    service = None
    if recipe.clustering is not None:
        service = service_of(recipe.placebo)(
            labels=labels.numpy(),
            num_classes=num_classes,
            dim=D,
            group=group,
            device=x.device,
            config=recipe.clustering,
            margin=recipe.head.margin,
            total_steps=total,
            steps_per_epoch=steps,
        )
    net.train()
    losses = []
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(x), generator=draw)
        sum_of_losses = 0.0
        for step in range(epoch * steps, (epoch + 1) * steps):
            ids_B = order[(step % steps) * recipe.batch :][: recipe.batch]
            lr = learning_rate(
                step, total_steps=total, steps_per_epoch=steps, global_batch=recipe.batch, config=recipe.optim
            )
            set_learning_rate(optimizers, lr)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            margin_loss = _backward(net, head, service, augment(x[ids_B], draw), labels[ids_B], ids_B, step, recipe)
            nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            if service is not None:
                service.advance(step)
            sum_of_losses += margin_loss
        losses.append(sum_of_losses / steps)
    net.eval()
    return Fitted(losses, service)


def _backward(
    net: nn.Module,
    head: PartialFCHead,
    service: ClusterService | None,
    x_B: Tensor,
    labels_B: Tensor,
    ids_B: Tensor,
    step: int,
    recipe: Recipe,
) -> float:
    """Gradients of the joint loss, as `training.step` has them; the bank takes the batch in. The margin loss."""
    batch = head.gather(net(x_B), labels_B, ids_B)
    if service is None:
        loss = margin = head(batch, step=step)
    else:
        loss = margin = head(service.for_head(batch), step=step, row_margins_N=service.row_margins(batch))
        ramp, c = service.ramp(step), service.config
        if ramp > 0:
            contrastive, alignment = service.contrastive(batch), service.alignment(batch, head.weight)
            loss = margin + ramp * (c.contrastive_weight * contrastive + c.alignment_weight * alignment)
    loss.backward()
    if service is not None:
        service.observe(batch)
    return float(margin.detach())
