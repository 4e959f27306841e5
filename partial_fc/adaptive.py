"""Losses whose margin depends on the sample or on the state of training: MagFace, AdaFace, CurricularFace.

Each is built from a plain margin (`partial_fc.margins`). What they learn on the way, AdaFace's statistics and
CurricularFace's t, is the same on all ranks, lies in buffers and is saved with the head.

Legend: N rows of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.collectives import all_reduce_
from partial_fc.margins import Target, TargetMargin, arcface
from partial_fc.negatives import HardNegatives

_MIN_DEVIATION = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class MagFace:
    """Longer embeddings are of better images: their margin is larger (MagFace, arXiv 2103.06627)."""

    length_low: float
    length_high: float
    margin_low: float
    margin_high: float

    def margin(self, length_N: Tensor) -> Tensor:
        """m(a), rising on a straight line from margin_low at length_low to margin_high at length_high;
        differentiable."""
        share_N = (length_N.clamp(self.length_low, self.length_high) - self.length_low) / (
            self.length_high - self.length_low
        )
        return self.margin_low + (self.margin_high - self.margin_low) * share_N

    def regulariser(self, length_N: Tensor) -> Tensor:
        """g(a) = a / length_high^2 + 1 / a: least at length_high, so that good images grow long; (N,).

        The paper takes a to lie in [length_low, length_high]. Ours pulls what lies outside as well, as an embedding
        that starts too short must be able to grow; below a length of 1 it goes on as 2 - a in the place of 1 / a, with
        the same slope at 1 and no pole at 0.
        """
        inverse_N = torch.where(length_N < 1, 2 - length_N, 1 / length_N.clamp_min(1))
        return length_N / self.length_high**2 + inverse_N


@dataclass(frozen=True, slots=True)
class AdaFaceTarget:
    """psi = cos(theta - m z) - (m + m z), z in [-1, 1] the quality of the image, by AdaFace's margin function.

    Good images (z = 1) get an additive margin in the cosine and a negative one in the angle, poor ones (z = -1) a
    positive one in the angle: arXiv 2204.00964, section 3.2. At the ends of the angle it goes on as `arcface` does,
    where the paper's own code holds the angle fast and gives no gradient.
    """

    quality_N: Tensor

    def __call__(self, cosine_N: Tensor, margin_N: Tensor) -> Target:
        turned = arcface(cosine_N, -margin_N * self.quality_N)
        return Target(
            turned.psi_N - margin_N * (1 + self.quality_N),
            turned.by_cosine_N,
            -self.quality_N * turned.by_margin_N - (1 + self.quality_N),
        )


class AdaFace(nn.Module):
    """Running mean and deviation of the embeddings' lengths, and each image's quality by them (arXiv 2204.00964)."""

    mean: Tensor
    deviation: Tensor
    batches: Tensor

    def __init__(self, *, spread: float, momentum: float) -> None:
        """spread: h of the paper, the deviations within 1 / h of the mean that z spans. momentum: share of the past."""
        super().__init__()
        self.spread, self.momentum = spread, momentum
        for name in ("mean", "deviation", "batches"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def forward(self, length_N: Tensor, valid_N: Tensor) -> AdaFaceTarget:
        """The margin for rows of these lengths. In training, rows with a label enter the statistics first.

        Statistics are of the global batch, which every rank has: the same on all, without a word. They begin as
        those of the first batch. (The paper's code begins at 20 and 100, whatever the backbone.)
        """
        length_N = length_N.detach()
        if self.training:
            count = valid_N.sum()
            mean = torch.where(valid_N, length_N, 0).sum() / count.clamp_min(1)
            squares = torch.where(valid_N, (length_N - mean).square(), 0).sum()
            deviation = (squares / (count - 1).clamp_min(1)).sqrt()
            share = torch.where(self.batches == 0, 1.0, 1 - self.momentum) * (count > 1)
            self.mean.lerp_(mean.to(self.mean), share.to(self.mean))
            self.deviation.lerp_(deviation.to(self.mean), share.to(self.mean))
            self.batches.add_(count > 1)
        z_N = (length_N - self.mean) * self.spread / self.deviation.clamp_min(_MIN_DEVIATION)
        return AdaFaceTarget(z_N.clamp(-1, 1))


class CurricularFace(nn.Module):
    """t, the running mean of the targets' cosines (arXiv 2004.00288), and the negatives it makes."""

    t: Tensor

    def __init__(self, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("t", torch.zeros(()))

    @torch.no_grad()
    def forward(
        self,
        cosine_N: Tensor,
        margin_N: Tensor,
        owned_N: Tensor,
        margin: TargetMargin,
        valid_N: Tensor,
        group: dist.ProcessGroup | None,
    ) -> HardNegatives:
        """What becomes of the other classes' cosines in this step. In training t moves first.

        cosine_N, margin_N: of the targets, read where owned_N says that this rank has them. One all-reduce of 2N
        floats: a tile must know the target's logit of every row, also of those whose class lies elsewhere.
        """
        psi_N = margin(cosine_N, margin_N).psi_N
        both_2N = torch.where(owned_N, torch.stack([psi_N, cosine_N.clamp(-1, 1)]), 0)
        psi_N, cosine_N = all_reduce_(both_2N, group)
        if self.training:
            mean = torch.where(valid_N, cosine_N, 0).sum() / valid_N.sum().clamp_min(1)
            self.t.lerp_(mean.to(self.t), ((1 - self.momentum) * valid_N.any()).to(self.t))
        return HardNegatives(self.t.clamp(0, 1).clone(), psi_N)
