"""The partition rule: exact cover for any size, and an owner function that is its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharding import all_shards, owner_of, shard_of


@given(world_size=st.integers(1, 17), total=st.integers(0, 200))
def test_shards_cover_everything_once_and_owner_is_the_inverse(world_size: int, total: int) -> None:
    shards = all_shards(world_size, total)
    assert [item for shard in shards for item in range(shard.start, shard.stop)] == list(range(total))
    assert max(s.size for s in shards) - min(s.size for s in shards) <= 1
    owners = [rank for rank, shard in enumerate(shards) for _ in range(shard.size)]
    assert owner_of(torch.arange(total), world_size, total).tolist() == owners


def test_items_outside_have_no_owner() -> None:
    assert owner_of(torch.tensor([-1, 10, 11]), 3, 10).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("rank", "world_size", "total"), [(-1, 2, 5), (2, 2, 5), (0, 0, 5), (0, 1, -1)])
def test_nonsense_is_refused(rank: int, world_size: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rank < world_size"):
        shard_of(rank, world_size, total)
