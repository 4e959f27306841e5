"""The partition rule: exact cover for any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import all_shards, shard_of


@given(world_size=st.integers(1, 17), total=st.integers(0, 200))
def test_shards_cover_everything_once(world_size: int, total: int) -> None:
    shards = all_shards(world_size, total)
    assert [item for shard in shards for item in range(shard.start, shard.stop)] == list(range(total))
    assert max(s.size for s in shards) - min(s.size for s in shards) <= 1


@pytest.mark.parametrize(("rank", "world_size", "total"), [(-1, 2, 5), (2, 2, 5), (0, 0, 5), (0, 1, -1)])
def test_nonsense_is_refused(rank: int, world_size: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rank < world_size"):
        shard_of(rank, world_size, total)
