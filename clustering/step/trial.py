"""One small problem for the functions of a step, with all that can occur in a batch, done in two ways.

Legend: as in `clustering.step.plain`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clustering.step.plain import BankRows, Columns, Moving, StepOps


def differences(
    ops: StepOps,
    other: StepOps,
    device: torch.device,
    *,
    rows: int,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Largest difference of each result, as a share of its largest number or of 1, by name; infinite where one is NaN.

    dtype: of bank, weight and operands of products. Among the rows are ones without a label, with ids of no sample, of
    other ranks, not finite, suspect, without a cluster, and of classes that come twice, that own several clusters or
    none; rows and centres of zeros, and a cluster that comes twice, too.
    """
    with torch.autocast(device.type, enabled=False):
        return _differences(ops, other, _Problem(rows, dim, seed, device, dtype))


def _differences(ops: StepOps, other: StepOps, made: _Problem) -> dict[str, float]:
    found = {}
    for name, work in made.works().items():
        one, two = work(ops), work(other)
        found[name] = max((_largest(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    return found


def _largest(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    scale = b.double().nan_to_num().abs().max().clamp_min(1)
    return float(((a.double() - b.double()) / scale).nan_to_num(nan=float("inf")).abs().max())


class _Problem:
    def __init__(self, rows: int, dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes, self.clusters, self.first_class, self.first_cluster = 12, 16, 3, 2
        self.dtype = dtype

        def unit(*shape: int) -> Tensor:
            return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

        def whole(high: int, *shape: int, low: int = 0) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        samples = 3 * rows
        self.x_ND = unit(rows, dim)
        self.ids_N = torch.randperm(samples, generator=generator)[:rows]
        self.labels_N = whole(self.classes + 6, rows)  # of three ranks
        self.labels_N[::9] = -1
        self.ids_N[4::10] = self.ids_N[::10][: len(self.ids_N[4::10])]  # come twice
        self.ids_N[1::10] = samples + 3
        self.ids_N[2::10] = -1
        self.odd_ND = self.x_ND.clone()  # what a bank and centres may be offered
        self.odd_ND[3::11, 1] = torch.inf
        self.odd_ND[5::13] = torch.nan
        self.odd_ND[7::17] = 0
        self.slots = torch.where(torch.arange(samples) % 4 == 0, -1, torch.arange(samples)).int()
        self.code_I = whole(self.clusters + 5, samples, low=-6).int()
        self.bank_XD, self.seen_X = unit(samples + 1, dim).to(dtype), whole(2, samples + 1).bool()
        self.c_SD, self.anchor_RD = unit(self.clusters, dim), unit(self.classes, dim)
        self.c_SD[4] = 0
        self.class_K = torch.full((self.clusters + 5,), -1)
        self.class_K[: self.classes + 2] = torch.randperm(self.classes + 4, generator=generator)[: self.classes + 2]
        owner_S = whole(self.classes - 2, self.clusters, low=-1) + self.first_class
        owner_S[::5] = -1
        self.owner_S, self.weight_S = owner_S, torch.rand(self.clusters, generator=generator)
        self.cluster_S = torch.arange(self.clusters)
        self.cluster_S[3] = 1  # comes twice
        self.other_N = 50 * torch.rand(rows, generator=generator)
        self.other_N[2:3] = 0
        self.own_N = torch.where(torch.arange(rows) % 6 == 0, 0.0, 30 * torch.rand(rows, generator=generator))
        self.own_N[4:5] = 1e-4
        self.taken_N = self.labels_N >= 0
        self.u_ND = unit(rows, dim)
        self.w_XD = (3 * torch.randn(2 * self.classes, dim, generator=generator)).to(dtype)
        self.f_R = torch.rand(self.classes, generator=generator)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def works(self) -> dict[str, Any]:
        return {
            "store": lambda ops: self._store(ops, 0.0),
            "store with momentum": lambda ops: self._store(ops, 0.3),
            "codes": lambda ops: ops.codes(self.code_I, self.ids_N, self.labels_N),
            "move": self._move,
            "own": self._own,
            "others": self._others,
            "join": lambda ops: ops.join(self.own_N, self.other_N, self.taken_N, self.u_ND, self.x_ND, 0.1),
            "align": lambda ops: self._align(ops, 1),
            "align with sub-centres": lambda ops: self._align(ops, 2),
        }

    def _store(self, ops: StepOps, momentum: float) -> tuple[Tensor, ...]:
        bank = BankRows(x_XD=self.bank_XD.clone(), seen_X=self.seen_X.clone(), slot_of_sample=self.slots)
        ops.store(bank, self.odd_ND, self.ids_N, self.labels_N, momentum)
        return bank.x_XD[:-1], bank.seen_X[:-1]

    def _move(self, ops: StepOps) -> tuple[Tensor, ...]:
        moving = Moving(
            c_SD=self.c_SD.clone(),
            first_cluster=self.first_cluster,
            anchor_RD=self.anchor_RD.clone(),
            first_class=self.first_class,
            class_K=self.class_K,
        )
        cluster_N, suspect_N = ops.codes(self.code_I, self.ids_N, self.labels_N)
        ops.move(moving, self.odd_ND, cluster_N, suspect_N, 0.9)
        return moving.c_SD, moving.anchor_RD

    def _columns(self) -> Columns:
        return Columns.build(cluster_S=self.cluster_S, c_SD=self.c_SD, owner_S=self.owner_S, weight_S=self.weight_S)

    def _own(self, ops: StepOps) -> tuple[Tensor, ...]:
        own_N, u_ND = ops.own(self._columns(), self.x_ND, self.labels_N, 0.2)
        return own_N, u_ND

    def _others(self, ops: StepOps) -> tuple[Tensor, ...]:
        other_N, u_ND = ops.others(self._columns(), self.x_ND, self.labels_N, 0.2, self.dtype)
        return other_N, u_ND

    def _align(self, ops: StepOps, subcentres: int) -> tuple[Tensor, ...]:
        w_XD = self.w_XD[: subcentres * self.classes]
        loss, row_N, gradient_ND = ops.align(self.labels_N, w_XD, self.anchor_RD, self.f_R, self.first_class)
        return loss[None], torch.zeros_like(w_XD, dtype=torch.float32).index_add_(0, row_N, gradient_ND)
