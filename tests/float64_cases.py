"""Checks of products and sums of rows in float64 that hold on a CPU, under Triton's interpreter and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.nearest import float64_rows

SIZES = [(1, 1, 1), (50, 7, 3), (301, 123, 40), (70, 512, 9)]
"""Rows, columns, rows of the sums."""
Found = tuple[float, float]


def rows(q: int, D: int, *, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(q, D, generator=generator)).to(device)


def dots(q: int, D: int, device: str, *, kernels: bool) -> Found:
    """How far products are from the truth, and how far those of pairs alone are from those of pairs together."""
    x_qD, y_YD = rows(q, D, seed=1, device=device), rows(q + 1, D, seed=2, device=device).T.contiguous().T
    row_q, other_q = torch.arange(q, device=device).flip(0), torch.arange(q, device=device) * 3 % (q + 1)
    find = float64_rows.row_dots
    if kernels:
        from clustering.nearest import kernel_float64_rows

        find = kernel_float64_rows.row_dots
    together_q = find(x_qD, row_q, y_YD, other_q)
    few = range(0, q, max(1, q // 20))
    alone_q = torch.cat([find(x_qD, row_q[i : i + 1], y_YD, other_q[i : i + 1]) for i in few])
    in_order_q = find(x_qD[row_q], None, y_YD, other_q)
    assert find(x_qD[:0], None, y_YD, other_q[:0]).shape == (0,)
    some_q = torch.where(torch.arange(q, device=device) % 3 == 1, other_q, -1)
    assert torch.equal(find(x_qD, row_q, y_YD, some_q), torch.where(some_q < 0, 0, together_q))
    true_q = (x_qD[row_q].cpu().to(torch.float64) * y_YD[other_q].cpu().to(torch.float64)).sum(1)
    off = float((together_q.cpu() - true_q).abs().max())
    differs = float((together_q[list(few)] - alone_q).abs().max() + (in_order_q - together_q).abs().max())
    return off, differs


def sums(q: int, D: int, S: int, device: str, *, kernels: bool) -> Found:
    """How far moved sums are from those of whole numbers, and by how much another order of the rows changes them."""
    move_ = float64_rows.move_
    if kernels:
        from clustering.nearest import kernel_float64_rows

        move_ = kernel_float64_rows.move_
    x_qD = rows(q, D, seed=3, device=device)
    generator = torch.Generator().manual_seed(4)
    old_q, new_q = (torch.randint(-2, S + 2, (q,), generator=generator).to(device) for _ in range(2))
    start_SD = torch.arange(S * D, device=device, dtype=torch.float64).view(S, D) / 4
    order_q = torch.randperm(q, generator=generator).to(device)
    found_SD, other_SD = start_SD.clone(), start_SD.clone()
    move_(found_SD, x_qD, old_q, new_q, 1.5 * 2.0**20)
    move_(found_SD, x_qD[:0], old_q[:0], new_q[:0], 1.5 * 2.0**20)
    move_(other_SD, x_qD[order_q], old_q[order_q], new_q[order_q], 1.5 * 2.0**20)
    whole_qD = (x_qD.cpu().double() * 2**32).round().long()  # 52 - 20 bits
    whole_SD = (start_SD.cpu() * 2**32).long()
    for i in range(q):
        if 0 <= old_q[i] < S:
            whole_SD[old_q[i]] -= whole_qD[i]
        if 0 <= new_q[i] < S:
            whole_SD[new_q[i]] += whole_qD[i]
    off = float((found_SD.cpu() * 2**32 - whole_SD).abs().max())
    return off, float((found_SD - other_SD).abs().max())
