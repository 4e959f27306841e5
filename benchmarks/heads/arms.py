"""The heads that `benchmarks.head` compares, on the same centres and batch, each with its optimizer.

Legend: B rows of the batch, D embedding size, C classes, S of them that take part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.heads.partial_fc_style import partial_fc_style_loss
from benchmarks.heads.rivals import RIVALS, RivalLoss, load_rivals, rival_margin_free_loss
from configs.schema import HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from partial_fc.reference import dense_margin_softmax
from training.distributed import Ranks
from training.showing.timing import Stopwatch

STYLE, DENSE, OURS = "partial_fc_style", "dense", "ours"
_LR, _MOMENTUM, _DECAY = 1e-5, 0.9, 5e-4
"""A rate so small that all turns see the same state: in a learned one, rivals' gradient filters would skip it all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """A head at a sample rate. STYLE: insightface's algorithm. DENSE: plain autograd. OURS. Or one of RIVALS."""

    kind: str
    rate: float = 1.0

    def __str__(self) -> str:
        return self.kind if self.rate == 1 else f"{self.kind}, rate {self.rate:g}"

    @property
    def baseline(self) -> Arm:
        """What its figures are divided by."""
        return Arm(STYLE, self.rate)

    def centres(self, classes: int, positives: int) -> int:
        """S, on average. Ours draws the rate's share of the classes beside the batch's; theirs counts those in."""
        if self.rate == 1:
            return classes
        if self.kind == OURS:
            return round(self.rate * classes + (1 - self.rate) * positives)
        return max(int(self.rate * classes), positives)

    def bytes_needed(self, classes: int, batch: int, dim: int) -> int:
        """What a process with all heads holds at this one's peak; baseline and dense head checked on CPUs.

        Centres and two momenta are always there. Logits and what comes of them are gone when the centres' gradient is
        made, and that is whole when the optimizer, to decay, makes another array of its size.
        """
        sampled = round(self.rate * classes)
        shard, rows, logits = classes * dim, sampled * dim, batch * sampled
        copies = {STYLE: 4, DENSE: 5}.get(self.kind, 1)  # of the logits
        return 4 * max(3 * shard + 3 * rows // 2 + copies * logits, 4 * shard + 4 * rows, 5 * shard)


def arms_of(rates: Sequence[float], device: torch.device) -> tuple[list[Arm], dict[str, str]]:
    """The heads to compare, the baseline of each rate first, and why others are left out."""
    losses, left_out = load_rivals(device)
    arms = [Arm(kind, rate) for rate in sorted(set(rates), reverse=True) for kind in (STYLE, DENSE, OURS, *losses)]
    return [arm for arm in arms if arm.rate == 1 or arm.kind in (STYLE, OURS)], left_out


class Problem:
    """Centres, a batch and the optimizers; every head works on the same ones."""

    def __init__(self, classes: int, *, batch: int, dim: int, seed: int, config: HeadConfig, ranks: Ranks) -> None:
        """config: of ours; the others read its scale and margin."""
        self.ranks = ranks
        self.bf16 = ranks.device.type == "cuda"
        self.head = PartialFCHead(
            num_classes=classes,
            embedding_size=dim,
            config=config,
            group=ranks.group,
            seed=seed,
            product_dtype=torch.bfloat16 if self.bf16 else torch.float32,
        ).to(ranks.device)
        generator = torch.Generator().manual_seed(seed)
        self.labels_B = torch.randint(0, classes, (batch,), generator=generator).to(ranks.device)
        noise_BD = F.normalize(torch.randn(batch, dim, generator=generator)).to(ranks.device)
        # Half-learned rows. Of random ones the baseline cuts the losses off, and the heads could not be compared.
        x_BD = F.normalize(noise_BD + 0.5 * F.normalize(self.head.weight.data[self.labels_B].float()))
        self.x_BD = x_BD.requires_grad_()
        self.margins_C = torch.full((classes,), self.head.config.margin, device=ranks.device)
        self.centre_sgd = CentreSGD([self.head.weight], lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY)
        self.rivals: dict[str, RivalLoss] = load_rivals(ranks.device)[0]

    @functools.cached_property
    def w_CD(self) -> nn.Parameter:
        """Float32 centres of the others. Where ours are float32 too, another parameter on the same memory: what our
        optimizer ties to its own they do not see.
        """
        return nn.Parameter(self.head.weight.data.float())

    @functools.cached_property
    def plain_sgd(self) -> torch.optim.SGD:
        """Of the others."""
        return torch.optim.SGD([self.w_CD], lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY)

    @property
    def positives(self) -> int:
        """Classes of the batch."""
        return len(self.labels_B.unique())

    def loss(self, arm: Arm, turn: int) -> Tensor:
        """turn: seeds the sampling of ours."""
        config = self.head.config
        if arm.kind in RIVALS:
            return rival_margin_free_loss(
                self.rivals[arm.kind], self.x_BD, self.w_CD, self.labels_B, scale=config.scale
            )
        if arm.kind == STYLE:
            return partial_fc_style_loss(
                self.x_BD,
                self.w_CD,
                self.labels_B,
                margin=config.margin,
                scale=config.scale,
                sample_rate=arm.rate,
                bf16=self.bf16,
            )
        if arm.kind == DENSE:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.bf16):
                return dense_margin_softmax(self.x_BD, self.w_CD, self.labels_B, self.margins_C, scale=config.scale)
        self.head.config = dataclasses.replace(config, sample_rate=arm.rate)
        ids_B = torch.arange(len(self.x_BD), device=self.ranks.device)
        loss: Tensor = self.head(gather_batch(self.x_BD, self.labels_B, ids_B, self.ranks.group), step=turn)
        return loss

    def step(self, arm: Arm, turn: int) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer. Gradients are gone when it begins and when it ends."""
        learn, update = Stopwatch(self.ranks.device), Stopwatch(self.ranks.device)
        optimizer = self.centre_sgd if arm.kind == OURS else self.plain_sgd
        with learn:
            self.loss(arm, turn).backward()
        with update:
            optimizer.step()
        seconds = learn.take(), update.take()
        optimizer.zero_grad(set_to_none=True)
        self.x_BD.grad = None
        return seconds

    @torch.no_grad()
    def check(self, arms: Sequence[Arm]) -> None:
        """Over all classes the heads must mean the same loss, or their times say nothing.

        Rivals have no margin and are left out. Raises RuntimeError.
        """
        losses = {arm: self.loss(arm, 0).item() for arm in arms if arm.rate == 1 and arm.kind not in RIVALS}
        if not losses:
            return
        low, high = min(losses.values()), max(losses.values())
        rounded = self.bf16 or self.head.weight.dtype != torch.float32
        if not high - low <= (0.05 if rounded else 1e-4) * abs(high):
            told = ", ".join(f"{arm}: {loss}" for arm, loss in losses.items())
            raise RuntimeError(f"heads disagree about the loss: {told}")
