"""insightface's Partial FC (version 2), written plainly from its description: the baseline of these benchmarks.

Source of the algorithm: An et al., "Killing Two Birds with One Stone", arXiv 2203.15565, and ArcFace, arXiv 1801.07698.
Each step: unit rows of embeddings and of the centres that take part; their cosines, float32 (B, S); the margin, written
into the targets' entries outside of autograd, so that its own derivative is left out; times s; a softmax whose
probabilities are kept for backward, which subtracts a one-hot matrix. Sampled centres are drawn by the largest of
random scores, the batch's classes first, and taken out of the shard through autograd: their gradient is as large as
the shard, and a plain optimizer walks over all of it.

On W ranks this runs 5 + W collectives a step: all-gathers of labels and of embeddings, all-reduces of the row's
maximum, its sum and its target's probability, and W reduces of the embeddings' gradient. Here it runs on one rank,
where all of these are the identity; `benchmarks.collectives` measures them.

Legend: B rows of the batch, D embedding size, C centres of the shard, S of them that take part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_PROBABILITY = 1e-30
"""Of the loss's value alone: no row's exceeds 69."""


class _SoftmaxLoss(torch.autograd.Function):
    """Mean of -log softmax at the targets, in the memory of the logits, which are gone afterwards."""

    @staticmethod
    def forward(ctx: Any, logits_BS: Tensor, target_B: Tensor) -> Tensor:
        logits_BS.sub_(logits_BS.amax(dim=1, keepdim=True))
        probabilities_BS = logits_BS.exp_()
        probabilities_BS.div_(probabilities_BS.sum(dim=1, keepdim=True))
        ctx.save_for_backward(probabilities_BS, target_B)
        return -probabilities_BS.gather(1, target_B[:, None]).clamp_min(_LEAST_PROBABILITY).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probabilities_BS, target_B = ctx.saved_tensors
        one_hot_BS = torch.zeros_like(probabilities_BS).scatter_(1, target_B[:, None], 1)
        return (probabilities_BS - one_hot_BS).mul_(grad / len(target_B)), None


def sampled_rows(labels_B: Tensor, classes: int, rate: float) -> Tensor:
    """Sorted rows that take part, int64 (S,): rate x classes, or the batch's classes where these are more.

    From torch's global generator of labels_B's device.
    """
    positives: Tensor = labels_B.unique()
    wanted = int(rate * classes)
    if wanted <= len(positives):
        return positives
    score_C = torch.rand(classes, device=labels_B.device)
    score_C[positives] = 2.0  # above every random one
    _, rows_S = score_C.topk(wanted)
    return rows_S.sort()[0]


def partial_fc_style_loss(
    x_BD: Tensor,
    w_CD: Tensor,
    labels_B: Tensor,
    *,
    margin: float,
    scale: float,
    sample_rate: float = 1.0,
    bf16: bool = False,
) -> Tensor:
    """Mean loss over the batch, a scalar. ArcFace's margin, straight through.

    x_BD, w_CD: float32 rows of any length. labels_B: int64, every row has one. bf16: cosines by a product of bf16
    operands and with a bf16 result, as autocast makes it; all else is float32. Backward works once. No collective.
    """
    target_B = labels_B
    w_SD = w_CD
    if sample_rate < 1:
        rows_S = sampled_rows(labels_B, w_CD.shape[0], sample_rate)
        target_B = torch.searchsorted(rows_S, labels_B)
        w_SD = w_CD[rows_S]
    with torch.autocast(x_BD.device.type, dtype=torch.bfloat16, enabled=bf16):
        cosine_BS = F.linear(F.normalize(x_BD), F.normalize(w_SD))
    cosine_BS = cosine_BS.float().clamp(-1, 1)
    with torch.no_grad():
        row_B = torch.arange(len(target_B), device=target_B.device)
        cosine_BS[row_B, target_B] = (cosine_BS[row_B, target_B].arccos() + margin).cos()
    loss: Tensor = _SoftmaxLoss.apply(cosine_BS * scale, target_B)  # type: ignore[no-untyped-call]
    return loss
