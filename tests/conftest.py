from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The session's pool of four gloo ranks: `ranks.run(world_size, fn, *args)`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
