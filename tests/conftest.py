from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool
from tests.triton_process import Run, fresh_process


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The session's pool of four gloo ranks: `ranks.run(world_size, fn, *args)`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs functions in a process in which Triton runs its kernels as Python."""
    yield from fresh_process(True, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs functions in a process in which Triton compiles its kernels."""
    yield from fresh_process(False, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTERFACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
