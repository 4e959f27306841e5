"""Problems for the kernels, and their truth in float64: the dense formula, and autograd through it.

Legend: N rows, D columns, C centres, S of them that take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc import kernels
from partial_fc.negatives import HardNegatives, InterclassFilter, Negatives

SCALE = 16.0  # cosines of random rows are small: exponentials range over five decades as they do in training
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes and kind of one problem. It names the test."""

    N: int
    D: int
    C: int
    sampled: bool = False
    """About two thirds of the centres, and some padding."""
    negatives: str = "plain"
    product_dtype: torch.dtype = FP32
    weight_dtype: torch.dtype = FP32
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.N}x{self.D}x{self.C}", self.negatives, "sampled" if self.sampled else "all"]
        return "-".join([*words, *(str(t)[6:] for t in (self.product_dtype, self.weight_dtype) if t != FP32)])


@dataclass(frozen=True, slots=True)
class Problem:
    terms: kernels.Terms
    batch: kernels.CosineGradient
    generator: torch.Generator


def problem(case: Case, device: str) -> Problem:
    """Random tensors; a third of the rows has its target elsewhere."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_ND = torch.nn.functional.normalize(normal(case.N, case.D))
    w_CD = normal(case.C, case.D) * torch.rand(case.C, 1, generator=generator).add(0.05)
    target_N = torch.randint(case.C, (case.N,), generator=generator)
    rows_S = None
    if case.sampled:
        taken_C = torch.rand(case.C, generator=generator) < 2 / 3
        taken_C[target_N] = True
        rows_S = torch.cat([taken_C.nonzero()[:, 0], torch.full((5,), case.C)]).to(device)
    target_N[torch.rand(case.N, generator=generator) < 1 / 3] = -1
    psi_N = 0.1 * normal(case.N)
    by_N, at_target_N = normal(case.N), normal(case.N)
    negatives: dict[str, Negatives | None] = {
        "plain": None,
        "filter": InterclassFilter(0.1),
        "hard": HardNegatives(torch.tensor(0.3, device=device), psi_N.to(device)),
    }
    terms = kernels.Terms(
        x_ND=x_ND.to(device),
        w_CD=w_CD.to(device, case.weight_dtype),
        target_N=target_N.to(device),
        rows_S=rows_S,
        scale=SCALE,
        shift=3.0,
        negatives=negatives[case.negatives],
        product_dtype=case.product_dtype,
    )
    batch = kernels.CosineGradient(terms=terms, by_N=by_N.to(device), at_target_N=at_target_N.to(device))
    return Problem(terms, batch, generator)


def _true_exponentials(x_ND: Tensor, w_CD: Tensor, terms: kernels.Terms) -> tuple[Tensor, Tensor]:
    """exp(logit - shift) (N, C), 0 for targets and classes that take no part; cosines (N, C)."""
    cosine_NC = x_ND @ torch.nn.functional.normalize(w_CD, dim=1).T
    value_NC = cosine_NC
    if isinstance(terms.negatives, InterclassFilter):
        value_NC = torch.where(cosine_NC > terms.negatives.threshold, 0, cosine_NC)
    if isinstance(terms.negatives, HardNegatives):
        harder_NC = cosine_NC * (terms.negatives.t.double().cpu() + cosine_NC)
        value_NC = torch.where(cosine_NC > terms.negatives.psi_N.double().cpu()[:, None], harder_NC, cosine_NC)
    classes_C = torch.arange(len(w_CD))
    counts_NC = classes_C[None] != terms.target_N.cpu()[:, None]
    if terms.rows_S is not None:
        counts_NC &= torch.isin(classes_C, terms.rows_S.cpu())[None]
    return torch.where(counts_NC, (terms.scale * value_NC - terms.shift).exp(), 0), cosine_NC


def true_forward(terms: kernels.Terms) -> tuple[Tensor, Tensor]:
    x_ND = terms.x_ND.double().cpu().requires_grad_()
    other_N = _true_exponentials(x_ND, terms.w_CD.double().cpu(), terms)[0].sum(1)
    (grad_ND,) = torch.autograd.grad(other_N.sum(), x_ND)
    return other_N.detach(), grad_ND / terms.scale


def true_gradient(batch: kernels.CosineGradient) -> Tensor:
    """(C, D)."""
    terms = batch.terms
    w_CD = terms.w_CD.double().cpu().requires_grad_()
    e_NC, cosine_NC = _true_exponentials(terms.x_ND.double().cpu(), w_CD, terms)
    here_N = terms.target_N.cpu() >= 0
    at_target_N = cosine_NC.gather(1, terms.target_N.cpu().clamp_min(0)[:, None])[:, 0]
    by_N, slope_N = batch.by_N.double().cpu(), batch.at_target_N.double().cpu()
    loss = (e_NC.sum(1) * by_N / terms.scale).sum() + torch.where(here_N, at_target_N * slope_N, 0).sum()
    return torch.autograd.grad(loss, w_CD)[0]


def _without(v_CD: Tensor, w_CD: Tensor) -> Tensor:
    return v_CD - (v_CD * w_CD).sum(1, keepdim=True) / (w_CD * w_CD).sum(1, keepdim=True) * w_CD


def true_step(rule: Any, w_CD: Tensor, d_CD: Tensor) -> dict[str, Tensor]:
    """New centres and states, of all rows, in float64."""
    w_CD = w_CD.double().cpu()
    if isinstance(rule, kernels.Sgd):
        v_CD = rule.velocity_CD.double().cpu()
        v_CD = rule.momentum * (_without(v_CD, w_CD) if rule.on_sphere else v_CD) + d_CD
        v_CD += 0 if rule.on_sphere else rule.decay * w_CD
        new_CD, found = w_CD - rule.lr * v_CD, {"velocity_CD": v_CD}
    else:
        (beta1, beta2), k_C1 = rule.betas, rule.row_steps_C1.double().cpu() + 1
        mean_CD = beta1 * rule.mean_CD.double().cpu() + (1 - beta1) * d_CD
        square_CD = beta2 * rule.square_CD.double().cpu() + (1 - beta2) * d_CD**2
        step_CD = rule.lr * mean_CD / (1 - beta1**k_C1) / ((square_CD / (1 - beta2**k_C1)).sqrt() + rule.eps)
        decayed_CD = (1 - rule.lr * rule.decay) * w_CD
        new_CD = w_CD - _without(step_CD, w_CD) if rule.on_sphere else decayed_CD - step_CD
        found = {"mean_CD": mean_CD, "square_CD": square_CD, "row_steps_C1": k_C1}
    if rule.on_sphere:
        new_CD *= w_CD.norm(dim=1, keepdim=True) / new_CD.norm(dim=1, keepdim=True)
    return found | {"w_CD": new_CD}
