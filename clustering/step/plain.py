"""What a training step does for each row of its batch, plainly in torch: the specification of the kernels.

The same functions in Triton: `clustering.step.kernel_step` and `clustering.step.kernel_losses`. None runs a collective,
and none but `Columns.build`, once a version, makes a GPU's host wait.

Legend: N rows of the global batch, M columns that one class owns at most, m of them at a time; D embedding size, K
clusters of all ranks, S of this rank, s of them in a tile, R classes of this rank, X rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clustering.service.shards import unit_or
from partial_fc.products import product

TILE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Numbers of the largest temporary: 1 MB of float32 on a CPU core, 256 MB on a GPU."""
NOBODY = 2**31 - 1
"""Owner of a column that takes no part: larger than any class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankRows:
    """A bank's tensors. Its last row takes what lies elsewhere."""

    x_XD: Tensor
    seen_X: Tensor
    """bool."""
    slot_of_sample: Tensor
    """int32, the row of every sample of the set, -1 for one that lies elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The clusters of this rank as the contrastive loss takes them, and where to find those of a class."""

    c_SD: Tensor
    """Unit centres; they get no gradient."""
    weight_S: Tensor
    """float32, w_k: sum to 1 over the clusters of a class, on all ranks together."""
    owner_S: Tensor
    """int64: the class that owns the cluster; `NOBODY`: it takes no part."""
    owned_S: Tensor
    """int64: owners, rising."""
    order_S: Tensor
    """int64: the columns in that order."""
    most: int
    """M."""

    @classmethod
    def build(cls, *, cluster_S: Tensor, c_SD: Tensor, owner_S: Tensor, weight_S: Tensor) -> Columns:
        """Columns of the clusters `cluster_S` (int64), owner -1: it takes no part; nor does one that comes again, a
        second time. The host waits.
        """
        owner_S = torch.where(first_of_each(cluster_S) & (owner_S >= 0), owner_S, NOBODY)
        owned_S, order_S = owner_S.sort(stable=True)
        counts_X = torch.unique_consecutive(owned_S[owned_S < NOBODY], return_counts=True)[1]
        most = int(counts_X.max()) if len(counts_X) else 0
        return cls(c_SD=c_SD, weight_S=weight_S, owner_S=owner_S, owned_S=owned_S, order_S=order_S, most=most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moving:
    """What a batch moves: this rank's shard of the centres, and its classes' anchors."""

    c_SD: Tensor
    first_cluster: int
    anchor_RD: Tensor
    first_class: int
    class_K: Tensor
    """int64, on every rank: the class matched to the cluster, -1 for none."""


def sorted_runs(values_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values in rising order, where each stood, and whether it is the first of its equals, bool (N,). No host sync."""
    sorted_N, order_N = values_N.sort(stable=True)
    starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return sorted_N, order_N, starts_N


def first_of_each(values_N: Tensor) -> Tensor:
    """True at the first place of every distinct value, bool (N,). No host sync."""
    _, order_N, starts_N = sorted_runs(values_N)
    return torch.empty_like(starts_N).scatter_(0, order_N, starts_N)


def store(bank: BankRows, x_ND: Tensor, ids_N: Tensor, labels_N: Tensor, momentum: float) -> None:
    """Rows of the batch that lie here into the bank: those with a label whose numbers are all finite.

    Of a sample that comes several times in a batch its first row counts.

    momentum: above 0 a row becomes unit(momentum row + (1 - momentum) x) when its sample comes again.
    """
    samples, nowhere = len(bank.slot_of_sample), len(bank.x_XD) - 1
    known_N = (labels_N >= 0) & (ids_N >= 0) & (ids_N < samples)
    slot_N = bank.slot_of_sample[ids_N.clamp(0, samples - 1)].long()
    slot_N = torch.where(known_N & (slot_N >= 0), slot_N, nowhere)
    slot_N = torch.where(first_of_each(slot_N) & x_ND.isfinite().all(1), slot_N, nowhere)
    if momentum:
        mean_ND = torch.lerp(x_ND, bank.x_XD[slot_N].to(x_ND.dtype), momentum)
        x_ND = torch.where(bank.seen_X[slot_N, None], unit_or(mean_ND, x_ND), x_ND)
    bank.x_XD.index_copy_(0, slot_N, x_ND.to(bank.x_XD.dtype))
    bank.seen_X.index_fill_(0, slot_N, True)


def codes(code_I: Tensor, ids_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster of each row, int64 (N,), -1 for none or an unlabelled row; and whether it is suspect, bool (N,).

    code_I: int32, of every sample: cluster + 1, negative for a suspect, 0 for none.
    """
    known_N = (labels_N >= 0) & (ids_N >= 0) & (ids_N < len(code_I))
    code_N = torch.where(known_N, code_I[ids_N.clamp(0, len(code_I) - 1)].long(), 0)
    return code_N.abs() - 1, code_N < 0


def move(moving: Moving, x_ND: Tensor, cluster_N: Tensor, suspect_N: Tensor, momentum: float) -> None:
    """c_k <- unit(momentum c_k + (1 - momentum) mean of the batch's rows of cluster k), and anchors alike.

    Suspects and rows that are not finite are left out.
    """
    m = moving
    cluster_N = torch.where(suspect_N | ~x_ND.isfinite().all(1), -1, cluster_N)
    sorted_N, order_N, starts_N = sorted_runs(cluster_N)
    segment_N = starts_N.cumsum(0) - 1
    mean_ND = torch.zeros_like(x_ND).index_add_(0, segment_N, x_ND[order_N])
    count_N = torch.zeros_like(x_ND[:, 0]).index_add_(0, segment_N, torch.ones_like(x_ND[:, 0]))
    mean_ND /= count_N.clamp_min(1)[:, None]
    # The cluster of each segment; segments beyond the last stay -1.
    cluster_N = torch.full_like(cluster_N, -1).scatter_(0, segment_N, sorted_N)
    class_N = torch.where(cluster_N >= 0, m.class_K[cluster_N.clamp_min(0)], -1)
    for rows_XD, place_N in ((m.c_SD, cluster_N - m.first_cluster), (m.anchor_RD, class_N - m.first_class)):
        if not len(rows_XD):
            continue
        here_N = (place_N >= 0) & (place_N < len(rows_XD)) & (cluster_N >= 0)
        row_N = place_N.clamp(0, len(rows_XD) - 1)
        old_ND = rows_XD[row_N]
        new_ND = unit_or(momentum * old_ND + (1 - momentum) * mean_ND, old_ND)
        # Added, not stored: rows that lie elsewhere add zero to some row here, in any order.
        rows_XD.index_add_(0, row_N, torch.where(here_N[:, None], new_ND - old_ND, 0))


def own(columns: Columns, x_ND: Tensor, labels_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """P of each row, (N,), and U_P but for 1/tau, (N, D): over the clusters here that its class owns."""
    own_N, u_own_ND = torch.zeros_like(x_ND[:, 0]), torch.zeros_like(x_ND)
    owned_S, last = columns.owned_S, len(columns.owned_S) - 1
    first_N = torch.searchsorted(owned_S, labels_N)
    step = max(1, TILE_NUMBERS[x_ND.device.type] // max(1, x_ND.numel()))
    for start in range(0, columns.most, step):
        place_Nm = first_N[:, None] + torch.arange(start, min(start + step, columns.most), device=x_ND.device)
        owned_Nm = (labels_N >= 0)[:, None] & (place_Nm <= last)
        place_Nm = place_Nm.clamp_max(last)
        owned_Nm &= owned_S[place_Nm] == labels_N[:, None]
        column_Nm = columns.order_S[place_Nm]
        c_NmD = columns.c_SD[column_Nm]
        with torch.autocast(x_ND.device.type, enabled=False):  # around it, the caller's would round
            e_Nm = torch.bmm(c_NmD, x_ND[:, :, None] / temperature)[:, :, 0].exp_() * columns.weight_S[column_Nm]
            e_Nm = torch.where(owned_Nm, e_Nm, 0)
            own_N += e_Nm.sum(1)
            u_own_ND += torch.bmm(e_Nm[:, None], c_NmD)[:, 0]
    return own_N, u_own_ND


def others(
    columns: Columns, x_ND: Tensor, labels_N: Tensor, temperature: float, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """O of each row, (N,), and U_O but for 1/tau, (N, D): over the clusters here that its class does not own.

    product_dtype: operands of the matrix products. Takes two tiles (N, s), one at a time, however many columns.
    """
    other_N, u_other_ND = torch.zeros_like(x_ND[:, 0]), torch.zeros_like(x_ND, memory_format=torch.contiguous_format)
    step = max(64, TILE_NUMBERS[x_ND.device.type] // max(len(x_ND), 1))
    for c_sD, owner_s in zip(columns.c_SD.split(step), columns.owner_S.split(step), strict=True):
        operand_sD = c_sD if product_dtype == torch.float32 else c_sD.to(product_dtype)
        e_Ns = product(x_ND / temperature, operand_sD.T, product_dtype).exp_()
        e_Ns.masked_fill_((owner_s == NOBODY) | (owner_s == labels_N[:, None]), 0)
        other_N += e_Ns.sum(1)
        u_other_ND += product(e_Ns, operand_sD, product_dtype)
    return other_N, u_other_ND


def join(
    own_N: Tensor, other_N: Tensor, taken_N: Tensor, u_own_ND: Tensor, u_other_ND: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """L_scc, a scalar, and its gradient, (N, D), from P and O of all ranks and this rank's U_P and U_O.

    taken_N: bool, rows that take part. A row whose class has no cluster draws nowhere: 0.
    """
    # Logarithms of the sums, as their ratio can leave float32.
    drawn_N = taken_N & (own_N > 0)
    odds_N = torch.where(drawn_N, other_N.log() - own_N.log(), float("-inf"))
    count = taken_N.sum().clamp_min(1)
    share_N = drawn_N / (temperature * count)
    push_N = share_N / (own_N + other_N).clamp_min(torch.finfo(own_N.dtype).tiny)
    pull_N = torch.where(drawn_N, share_N * odds_N.sigmoid() / own_N, 0)
    gradient_ND = u_other_ND * push_N[:, None] - u_own_ND * pull_N[:, None]
    return torch.nn.functional.softplus(odds_N).sum() / count, gradient_ND


def align(
    labels_N: Tensor, weight_XD: Tensor, anchor_RD: Tensor, f_R: Tensor, first_class: int
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of L_al, a scalar, and its gradient by rows of the weight: (N,) int64 and (N, D) float32.

    A row that stands for no class of this rank names one of another row, or the first, with a gradient of zero.
    N >= 1, R >= 1.
    """
    R = len(anchor_RD)
    M = len(weight_XD) // R
    distinct_N = first_of_each(labels_N) & (labels_N >= 0)
    class_N = labels_N - first_class
    owned_N = distinct_N & (class_N >= 0) & (class_N < R)
    class_N = torch.where(owned_N, class_N, 0)
    w_NMD = weight_XD.view(R, M, -1)[class_N].float()
    length_NM = w_NMD.norm(dim=2).clamp_min(1e-12)
    unit_NMD, a_ND = w_NMD / length_NM[:, :, None], anchor_RD[class_N]
    cosine_N, best_N = (unit_NMD * a_ND[:, None]).sum(2).max(1)
    unit_ND = unit_NMD.gather(1, best_N[:, None, None].expand(-1, 1, unit_NMD.shape[2]))[:, 0]
    length_N1 = length_NM.gather(1, best_N[:, None])
    weight_N = torch.where(owned_N, f_R[class_N], 0) / distinct_N.sum().clamp_min(1)
    gradient_ND = (cosine_N[:, None] * unit_ND - a_ND) / length_N1 * weight_N[:, None]
    row_N = torch.where(owned_N, class_N * M + best_N, -1)
    return (weight_N * (1 - cosine_N)).sum(), torch.where(row_N < 0, row_N.amax().clamp_min(0), row_N), gradient_ND


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOps:
    """The functions above, or kernels that do the same."""

    store: Callable[..., None] = store
    codes: Callable[..., tuple[Tensor, Tensor]] = codes
    move: Callable[..., None] = move
    own: Callable[..., tuple[Tensor, Tensor]] = own
    others: Callable[..., tuple[Tensor, Tensor]] = others
    join: Callable[..., tuple[Tensor, Tensor]] = join
    align: Callable[..., tuple[Tensor, Tensor, Tensor]] = align


PLAIN = StepOps()
