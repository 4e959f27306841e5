"""Ranks of an attempt meet in a store where former attempts have left their words."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch.distributed as dist

from training.ranks.meeting import MeetingError, meet

_SOON = datetime.timedelta(seconds=20)


def _attempt(port: int, ranks: list[int], world_size: int) -> list[dist.Store]:
    found: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
        found[rank] = meet(store, rank, world_size, _SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(ranks)
    return [found[rank] for rank in ranks]


def test_every_attempt_has_a_place_of_its_own() -> None:
    kept = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for attempt, ranks in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        stores = _attempt(kept.port, ranks, 3)
        assert not stores[0].check(["left"]), "nothing of a former attempt is seen"
        stores[0].set("left", str(attempt))
        assert [store.get("left").decode() for store in stores] == [str(attempt)] * 3


def test_one_that_died_while_it_came_does_not_count() -> None:
    """Its word is there when the next attempt begins, and rank 0 is the first to come."""
    kept = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(MeetingError, match="1 of 2 ranks have come within 0 s"):
        meet(kept, 1, 2, datetime.timedelta(seconds=0.2))
    stores = _attempt(kept.port, [0, 1], 2)
    stores[0].set("x", "1")
    assert stores[1].get("x") == b"1"
