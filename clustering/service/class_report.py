"""How single classes stand in the version in use: the easiest and the hardest, over all ranks.

Legend: R classes of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.service.published import Published
from partial_fc.collectives import all_reduce_


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """How one class stands."""

    label: int
    hard_level: float
    margin: float
    samples: int
    """Samples that k-means has seen, suspects left out."""


def easiest_and_hardest(
    published: Published, margins_R: Tensor, first_class: int, count: int, group: dist.ProcessGroup
) -> list[ClassReport]:
    """The `count` classes of smallest and the `count` of largest hard level, ascending, each class once.

    Over all ranks; classes without samples are left out. margins_R: margins in use. One all-reduce.
    """
    p = published
    order_R = p.hard_R.argsort(stable=True)
    order_R = order_R[p.samples_R[order_R] > 0]
    if len(order_R) > 2 * count:
        order_R = torch.cat([order_R[:count], order_R[len(order_R) - count :]])
    fields = (order_R + first_class, p.hard_R[order_R], margins_R[order_R], p.samples_R[order_R])
    world_size = dist.get_world_size(group)
    table = torch.zeros(world_size, 2 * count, len(fields), dtype=torch.float64, device=order_R.device)
    table[dist.get_rank(group), : len(order_R)] = torch.stack([values.double() for values in fields], dim=1)
    rows = [row for row in all_reduce_(table, group).flatten(0, 1).tolist() if row[3] > 0]
    rows.sort(key=lambda row: (row[1], row[0]))
    if len(rows) > 2 * count:
        rows = rows[:count] + rows[-count:]
    return [ClassReport(label=int(y), hard_level=h, margin=m, samples=int(n)) for y, h, m, n in rows]
