"""Memory of batches: used again when nobody holds it, and never before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data.loading.loader import build_loader
from data.loading.recycling import Recycled
from tests.image_cases import MemorySet, jpeg

SHAPE = (4, 3, 5, 3)


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor,
        lambda tensor: tensor.permute(0, 3, 1, 2),
        lambda tensor: tensor[1:2].reshape(-1),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[2, :, ::-1],
        lambda tensor: torch.from_numpy(tensor.numpy()[3:]),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: memoryview(tensor.numpy()),
    ],
    ids=["itself", "permuted", "part", "array", "view of the array", "tensor of a view", "storage", "memoryview"],
)
def test_what_shares_it_keeps_it(keep: Callable[[torch.Tensor], Any]) -> None:
    recycled = Recycled(SHAPE, pinned=False)
    first = recycled.tensor()
    assert (first.shape, first.dtype) == (SHAPE, torch.uint8)
    place, kept = first.data_ptr(), keep(first.fill_(7))
    del first
    other = recycled.tensor().fill_(9)
    assert other.data_ptr() != place
    values = np.frombuffer(bytes(kept), np.uint8) if isinstance(kept, torch.UntypedStorage) else np.asarray(kept)
    assert (values == 7).all()
    del values, kept
    assert recycled.tensor().data_ptr() == place


def test_it_may_outlive_what_made_it() -> None:
    recycled = Recycled(SHAPE, pinned=False)
    tensor = recycled.tensor().fill_(5)
    del recycled
    gc.collect()
    assert (tensor == 5).all()


def test_an_epoch_takes_memory_for_the_batches_that_are_held() -> None:
    """Those in work, that of the consumer, and whatever else it keeps, which stays as it was."""
    records = MemorySet([jpeg(seed) for seed in range(96)])
    loader = build_loader(
        records,
        batch_size=2,
        rank=0,
        world_size=1,
        seed=0,
        backend="cpu",
        device=torch.device("cpu"),
        threads=2,
        prefetch=3,
        flip=True,
        augment=None,
    )
    places, kept = set(), []
    for step, batch in enumerate(loader.epoch(0)):
        places.add(batch.images.data_ptr())
        if step % 10 == 0:
            kept.append((batch.images, batch.images.clone()))
    assert step == 47
    assert len(places) <= 3 + 1 + 1 + len(kept)
    assert len({image.data_ptr() for image, _ in kept}) == len(kept) == 5
    assert all(torch.equal(image, copy) for image, copy in kept)
