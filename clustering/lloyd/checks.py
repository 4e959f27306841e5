"""What a k-means over ranks is given is checked on all of them: none may raise while the others wait for it.

Legend: Q rows, S centres of a shard, D embedding size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.collectives import all_reduce_
from sharding import Shard

_UNIT = 1e-3
"""How far the length of a unit row may be from 1."""


def agree(problem: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ValueError on every rank where any has a problem, with its own words or a hint at the others'.

    Collectives: one all-reduce.
    """
    if int(all_reduce_(torch.tensor(int(bool(problem)), device=device), group)):
        raise ValueError(problem or "another rank was given rows, centres or sizes that do not fit: see its error")


def problem_of_centres(centres_SD: Tensor, own: Shard, num_clusters: int, dim: int, block: int) -> str:
    """Why these centres cannot be this rank's; empty where they can."""
    if num_clusters < 1 or dim < 1:
        return f"expected at least 1 cluster and 1 dimension, got {num_clusters} and {dim}"
    if block < 1:
        return f"block: expected at least 1 point at a time, got {block}"
    if centres_SD.dtype != torch.float32 or tuple(centres_SD.shape) != (own.size, dim):
        return (
            f"centres: expected float32 {(own.size, dim)}, this rank's clusters {own.start} … {own.stop - 1} by "
            f"sharding.shard_of, got {str(centres_SD.dtype).removeprefix('torch.')} {tuple(centres_SD.shape)}"
        )
    return _problem_of_lengths(centres_SD, "centre", own.start)


def problem_of_rows(x_QD: Tensor, first_row: int) -> str:
    """Why these rows cannot be clustered; empty where they can. first_row: the number of the first among all ranks'."""
    return _problem_of_lengths(x_QD, "row", first_row)


def _problem_of_lengths(x_QD: Tensor, name: str, first: int) -> str:
    length_Q = x_QD.norm(dim=1)
    bad_Q = ~((length_Q - 1).abs() <= _UNIT) & (length_Q != 0)  # written so that NaN is bad
    if not bool(bad_Q.any()):
        return ""
    place = int(bad_Q.int().argmax())
    return (
        f"{name} {first + place}: expected a row of length 1, or of zeros, got length {float(length_Q[place]):.6g}: "
        "scale the rows to unit length, and leave out those that are not finite"
    )
