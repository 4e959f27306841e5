from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch

from tests.ranks import RankPool
from tests.triton_process import Run, fresh_process

STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""Of the object store below."""


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


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """An S3 server."""
    from moto.server import ThreadedMotoServer  # takes a second, which most tests need not spend

    made = ThreadedMotoServer(port=0, verbose=False)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def endpoint(server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address, and fsspec's, with keys in the environment."""
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": address})
    return address


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """fsspec's file system and the name of an empty bucket."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files, name = fsspec.filesystem("s3"), f"bucket{abs(hash(request.node.name))}"
    files.mkdir(name)
    yield files, name
    files.rm(name, recursive=True)
