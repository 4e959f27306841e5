"""How the ranks of one attempt meet: under a prefix of the store that only they know.

Torchrun keeps one store through all its restarts, and in it what ranks of former attempts have left: addresses of
processes that are gone, words of who said what. (Torch 2.13 gives every attempt the same store without a prefix, and
how often a host has restarted is counted by each host for itself.) So the ranks agree on a name of their own first.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store

_POLL_S = 0.05


class MeetingError(RuntimeError):
    """Some ranks did not come in time."""


def meet(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> Store:
    """The store under a prefix that is this attempt's. No collective. Raises MeetingError after `timeout`.

    Every rank leaves a word of its own under its number; rank 0 writes down the words it finds with a name for the
    attempt, and again whenever one has changed; each rank that finds its own word there says yes to that name. When all
    have said yes to the same, rank 0 says that it holds. A word or a yes of a former attempt fits nothing.
    """
    word = uuid.uuid4().hex
    store.set(f"meeting/word/{rank}", word)
    deadline = time.monotonic() + timeout.total_seconds()
    roster: dict[str, str] = {}
    said = ""
    while time.monotonic() < deadline:
        if rank == 0:
            words = _read(store, "word", world_size)
            if len(words) == world_size and words != roster:
                roster = words
                store.set("meeting/roster", json.dumps({"name": uuid.uuid4().hex, "words": roster}))
        if store.check(["meeting/roster"]):
            told = json.loads(store.get("meeting/roster"))
            if told["words"].get(str(rank)) == word and told["name"] != said:
                said = told["name"]
                store.set(f"meeting/yes/{rank}", said)
            if rank == 0 and said and list(_read(store, "yes", world_size).values()) == [said] * world_size:
                store.set("meeting/holds", said)
            if said and store.check(["meeting/holds"]) and store.get("meeting/holds").decode() == said:
                return PrefixStore(f"attempt/{said}", store)
        time.sleep(_POLL_S)
    there = len(_read(store, "word", world_size))
    raise MeetingError(f"{there} of {world_size} ranks have come within {timeout.total_seconds():.0f} s")


def _read(store: Store, what: str, world_size: int) -> dict[str, str]:
    """What each rank has said so far."""
    keys = {str(rank): f"meeting/{what}/{rank}" for rank in range(world_size)}
    if not store.check(list(keys.values())):
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    if not keys:
        return {}
    values = store.multi_get(list(keys.values()))
    return {rank: value.decode() for rank, value in zip(keys, values, strict=True)}
