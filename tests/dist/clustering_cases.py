"""Problems that the cluster tests share: embeddings, labels and a filled bank on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.service.bank import EmbeddingBank
from partial_fc.collectives import GatheredBatch, gather_batch

CPU = torch.device("cpu")

Case = dict[str, Any]

CASES: dict[str, Case] = {
    "even": {"sizes": [7] * 13, "dim": 6, "extra": 3},
    "long tail": {"sizes": [40, 23, 11, 5, 3, 2, 1, 1, 1], "dim": 5, "extra": 2},
    "classes without samples": {"sizes": [0, 9, 0, 6, 7, 0, 0], "dim": 4, "extra": 1},
    "fewer classes than ranks": {"sizes": [9, 14, 5], "dim": 3, "extra": 0},
    "more clusters than samples": {"sizes": [1, 2, 2, 1], "dim": 4, "extra": 12},
    "one class": {"sizes": [14], "dim": 4, "extra": 2},
    "one sample a class": {"sizes": [1] * 10, "dim": 4, "extra": 2},
    "not all seen": {"sizes": [8, 3, 6, 6, 9], "dim": 4, "extra": 2, "unseen": 5},
    "labels confused": {"sizes": [10] * 9, "dim": 8, "extra": 2, "spread": 0.15, "flipped": 14},
}


def problem(case: Case) -> tuple[Tensor, Tensor, int, int]:
    """float64 unit embeddings (N, D), labels (N,) in a shuffled order of samples, C and K."""
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    sizes = case["sizes"]
    truth_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    truth_N = truth_N[torch.randperm(len(truth_N), generator=generator)]
    centres_CD = F.normalize(torch.randn(len(sizes), case["dim"], generator=generator, dtype=torch.float64))
    noise_ND = torch.randn(len(truth_N), case["dim"], generator=generator, dtype=torch.float64)
    x_ND = F.normalize(centres_CD[truth_N] + case.get("spread", 0.5) * noise_ND)
    labels_N = truth_N.clone()
    flipped = torch.randperm(len(truth_N), generator=generator)[: case.get("flipped", 0)]
    shift = torch.randint(1, max(2, len(sizes)), (len(flipped),), generator=generator)
    labels_N[flipped] = (labels_N[flipped] + shift) % len(sizes)
    return x_ND, labels_N, len(sizes), len(sizes) + case["extra"]


def seen_rows(case: Case) -> Tensor:
    """bool (N,): the samples that the training has shown."""
    seen_N = torch.ones(sum(case["sizes"]), dtype=torch.bool)
    seen_N[: case.get("unseen", 0)] = False
    return seen_N


def filled_bank(group: dist.ProcessGroup, case: Case, dtype: torch.dtype = torch.float64) -> EmbeddingBank:
    x_ND, labels_N, C, _ = problem(case)
    bank = EmbeddingBank(
        labels=labels_N.numpy().astype(np.int64), num_classes=C, dim=case["dim"], group=group, device=CPU, dtype=dtype
    )
    seen_N = seen_rows(case)
    ids_N = torch.arange(len(labels_N))
    bank.update(GatheredBatch(x_ND[seen_N], labels_N[seen_N], ids_N[seen_N], group))
    return bank


def share_of(group: dist.ProcessGroup, rows: int) -> slice:
    """This rank's part of `rows` rows; `rows` is a multiple of the world size."""
    rank, part = dist.get_rank(group), rows // dist.get_world_size(group)
    return slice(rank * part, (rank + 1) * part)


def gathered(group: dist.ProcessGroup, x_ND: Tensor, labels_N: Tensor, ids_N: Tensor) -> tuple[Tensor, GatheredBatch]:
    """This rank's float32 rows as a leaf, and the batch of all ranks."""
    mine = share_of(group, len(x_ND))
    x_BD = x_ND[mine].float().requires_grad_()
    return x_BD, gather_batch(x_BD, labels_N[mine], ids_N[mine], group)


def by_sample(parts: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """(sample ids, values) of all ranks as one tensor in the order of the samples."""
    out = parts[0][1].new_zeros(rows, *parts[0][1].shape[1:])
    for ids, values in parts:
        out[ids] = values
    return out


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
