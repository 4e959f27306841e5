"""The method in dense float64 on one process, written to be read: what the sharded, sparse code must equal.

Legend: N samples, C classes, K clusters, D embedding size. T is the dense (C, K) table of counts.
"""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_counts(labels_N: Tensor, clusters_N: Tensor, C: int, K: int) -> Tensor:
    """T_yk, the number of samples of class y in cluster k; samples of cluster -1 are left out. float64 (C, K)."""
    t_CK = torch.zeros(C, K, dtype=torch.float64)
    for y, k in zip(labels_N.tolist(), clusters_N.tolist(), strict=True):
        if k >= 0:
            t_CK[y, k] += 1
    return t_CK


def dense_suspects(labels_N: Tensor, clusters_N: Tensor, C: int, K: int) -> Tensor:
    """Samples outside their class's modal cluster, in a cluster of another class, while their own class dominates
    its modal cluster. Ties go to the smaller index. bool (N,)."""
    t_CK = dense_counts(labels_N, clusters_N, C, K)
    suspects = []
    for y, k in zip(labels_N.tolist(), clusters_N.tolist(), strict=True):
        modal = int(t_CK[y].argmax())
        settled = int(t_CK[:, modal].argmax()) == y
        suspects.append(k >= 0 and settled and k != modal and int(t_CK[:, k].argmax()) != y)
    return torch.tensor(suspects)


def dense_clear_suspects(
    suspect_N: Tensor,
    x_ND: Tensor,
    labels_N: Tensor,
    clusters_N: Tensor,
    best_N: Tensor,
    C: int,
    K: int,
    gap: float,
    at_home: int,
) -> Tensor:
    """Suspects whose cosine to their cluster, best_N, is above the one to their class's home by more than gap: the unit
    mean of its first samples, at_home at most, in its modal cluster. bool (N,)."""
    t_CK = dense_counts(labels_N, clusters_N, C, K)
    clear_N = suspect_N.clone()
    for i in suspect_N.nonzero()[:, 0].tolist():
        y = int(labels_N[i])
        home_D = x_ND[(labels_N == y) & (clusters_N == int(t_CK[y].argmax()))][:at_home].double().sum(0)
        clear_N[i] = best_N[i] - x_ND[i].double() @ F.normalize(home_D, dim=0) > gap
    return clear_N


def dense_agreement(t_CK: Tensor) -> Tensor:
    """F_y = 2PR / (P + R) with BCubed precision P and pairwise recall R; R = 1 for one sample, F = 0 for none."""
    f_C = torch.zeros(len(t_CK), dtype=torch.float64)
    for y, t_K in enumerate(t_CK):
        n = t_K.sum()
        if n == 0:
            continue
        precision = sum(t_K[k] ** 2 / (n * t_CK[:, k].sum()) for k in t_K.nonzero()[:, 0])
        recall = (t_K * (t_K - 1)).sum() / (n * (n - 1)) if n > 1 else torch.ones(())
        f_C[y] = 2 * precision * recall / (precision + recall)
    return f_C


def dense_cohesion(x_ND: Tensor, labels_N: Tensor, C: int) -> Tensor:
    """rho_y, the mean dot product over all pairs of distinct samples of class y; 0 without a pair. float64 (C,)."""
    rho_C = torch.zeros(C, dtype=torch.float64)
    for y in range(C):
        x_nD = x_ND[labels_N == y].double()
        n = len(x_nD)
        if n > 1:
            dots_nn = x_nD @ x_nD.T
            rho_C[y] = (dots_nn.sum() - dots_nn.trace()) / (n * (n - 1))
    return rho_C


def dense_hard_level(f_C: Tensor, rho_C: Tensor, n_C: Tensor, purity_weight: float, shrinkage: float) -> Tensor:
    """h_y = (N h_raw + a mean) / (N + a); the mean, weighted by samples, for classes without a pair. float64 (C,)."""
    raw_C = purity_weight * (1 - f_C) + (1 - purity_weight) * (1 - rho_C.clamp(0, 1))
    paired_C = n_C >= 2
    mean = (n_C * raw_C)[paired_C].sum() / n_C[paired_C].sum() if paired_C.any() else torch.zeros(())
    return torch.where(paired_C, (n_C * raw_C + shrinkage * mean) / (n_C + shrinkage).clamp_min(1), mean)


def dense_margins(
    hard_C: Tensor, n_C: Tensor, suspects: int, *, margin: float, low: float, high: float, delta: float, direction: int
) -> Tensor:
    """clip(m0 + t + b, low, high), b such that the mean over rows is m0: n_C of each class, and the suspects, whose
    margin is the smallest. float64 (C,)."""
    weight_C = n_C / n_C.sum()
    mean = (weight_C * hard_C).sum()
    sigma = (weight_C * (hard_C - mean) ** 2).sum().sqrt()
    t_C = direction * delta * torch.tanh((hard_C - mean) / max(float(sigma), 0.05))
    below, above = low - margin - delta, high - margin + delta
    for _ in range(100):
        b = (below + above) / 2
        above_C = (margin + t_C + b).clamp(low, high) - margin
        if (n_C * above_C).sum() + suspects * above_C.min() < 0:
            below = b
        else:
            above = b
    return (margin + t_C + b).clamp(low, high)


def dense_kappaface(x_ND: Tensor, labels_N: Tensor, C: int, margin: float) -> list[float]:
    """KappaFace's margins as the head of `clustering.method.kappaface` says, from unit rows and Python numbers."""
    n_C = [int((labels_N == y).sum()) for y in range(C)]
    D = x_ND.shape[1]
    kappa_C = [math.nan] * C
    for y, n in enumerate(n_C):
        r2 = float((x_ND[labels_N == y].double().sum(0) / max(n, 1)).norm()) ** 2
        if n > 1 and 1 - r2 > 2**-10:
            kappa_C[y] = math.sqrt(r2) * (D - r2) / (1 - r2)
    largest = max((kappa for kappa in kappa_C if not math.isnan(kappa)), default=0.0)
    kappa_C = [largest if math.isnan(kappa) else kappa for kappa in kappa_C]
    counted = [kappa for kappa, n in zip(kappa_C, n_C, strict=True) if n > 0]
    mean, deviation = (statistics.fmean(counted), statistics.pstdev(counted)) if counted else (0.0, 0.0)
    margins = []
    for kappa, n in zip(kappa_C, n_C, strict=True):
        standard = 0.0 if deviation <= 1e-6 * mean else (kappa - mean) / deviation
        w_k = 1 - 1 / (1 + math.exp(-0.4 * standard))
        w_s = (math.cos(math.pi * n / max(1, *n_C)) + 1) / 2
        margins.append(margin * (0.7 * w_k + 0.3 * w_s) if n > 0 else margin)
    return margins


def dense_neighbours(anchor_CD: Tensor, count: int) -> list[list[int]]:
    """Of each class the `count` other classes by (cosine in steps of 2^-16, descending, class), then -1.

    A class whose anchor is a zero row has none and is nobody's.
    """
    level_CC = (anchor_CD.double() @ anchor_CD.double().T * 2**16).round()
    seen = [bool(anchor_D.any()) for anchor_D in anchor_CD]
    table = []
    for y in range(len(seen)):
        others = sorted((-float(level_CC[y, c]), c) for c in range(len(seen)) if c != y and seen[c] and seen[y])
        table.append(([c for _, c in others] + [-1] * count)[:count])
    return table


def greedy_matching(t_CK: Tensor) -> list[int]:
    """Class of each cluster (-1: none): entries by (count descending, class, cluster), each taken if both are free."""
    entries = sorted((-int(t_CK[y, k]), int(y), int(k)) for y, k in t_CK.nonzero())
    class_K = [-1] * t_CK.shape[1]
    matched: set[int] = set()
    for _, y, k in entries:
        if y not in matched and class_K[k] < 0:
            class_K[k] = y
            matched.add(y)
    return class_K


def dense_contrastive(
    x_ND: Tensor, labels_N: Tensor, taken_N: Tensor, c_KD: Tensor, owner_K: Tensor, weight_K: Tensor, temperature: float
) -> Tensor:
    """Mean over the rows of taken_N of -log(own / (own + other)); differentiable in x_ND."""
    losses = [x_ND.sum() * 0]
    for x_D, y in zip(x_ND[taken_N], labels_N[taken_N].tolist(), strict=True):
        terms_K = (c_KD @ x_D / temperature).exp()
        own = (weight_K * terms_K)[owner_K == y].sum()
        other = terms_K[(owner_K >= 0) & (owner_K != y)].sum()
        if own > 0:
            losses.append(-(own / (own + other)).log())
    return torch.stack(losses).sum() / max(1, int(taken_N.sum()))


def dense_alignment(labels_N: Tensor, w_CD: Tensor, anchor_CD: Tensor, f_C: Tensor) -> Tensor:
    """Mean over the distinct classes of the batch of F_y (1 - cos(W_y, a_y)); differentiable in w_CD."""
    classes = sorted({y for y in labels_N.tolist() if y >= 0})
    if not classes:
        return w_CD.sum() * 0
    return torch.stack([f_C[y] * (1 - F.cosine_similarity(w_CD[y], anchor_CD[y], dim=0)) for y in classes]).mean()
