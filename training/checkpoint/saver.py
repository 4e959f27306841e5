"""Checkpoints written beside training: the state is copied, and a thread of each rank writes the copy.

    main thread     copies the state, and goes on training
    every rank      writes its part, brings it to the disk, and tells so in the run's store
    rank 0          when all have: manifest, `latest`, and tells so; then removes what is no longer kept

No collective is run, so nothing comes between those of training. A run that dies on the way leaves the former
checkpoint, named by `latest`, whole; a rank that dies, or hears no more, after that leaves this one.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Rows
from training.checkpoint.errors import CheckpointError
from training.checkpoint.folder import Checkpoints, folder_of, part_of
from training.checkpoint.manifest import Facts, assembled
from training.checkpoint.part import write
from training.distributed import Ranks

_POLL_S = 0.02
_LOOK_S = 0.2
_SIGN = 32
"""Blocks after which a rank tells the others that its writing goes on."""


class Written(NamedTuple):
    """What became of one save, the same words on all ranks."""

    step: int
    error: str
    """Nothing when it counts."""
    seconds: float
    """Until it counted."""
    nbytes: int
    """Of this rank."""


class Saver:
    """Saves one checkpoint at a time. Every rank makes one and calls it alike."""

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks, token: str) -> None:
        """token: hexadecimal digits, the same on all ranks and of this process group alone."""
        self._checkpoints, self._ranks, self._token = checkpoints, ranks, token
        self._saves = 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._written: Written | None = None
        self._signs = 0
        """Of writing that goes on, here or on another rank."""

    def save(self, tensors: Mapping[str, Rows | Tensor], facts: Facts) -> None:
        """Copy the state and begin to write it. `finish` is to have told of the save before. No collective.

        tensors: `Rows` of this rank, or plain ones, the same on all ranks, of which rank 0's are taken.
        """
        if self._thread is not None:
            self._thread.join()  # it has told, and may still remove what is no longer kept
        own = {
            name: item for name, item in tensors.items() if self._ranks.is_main or isinstance(item, Rows)
        }  # an empty shard too: the manifest needs the shape
        copies = self._copied(own)
        self._saves += 1
        self._ended.clear()
        self._thread = threading.Thread(
            target=self._run,
            args=(self._saves, copies, facts),
            name="checkpoint",
            daemon=True,  # a run that ends by an error must not wait here for ranks that are gone
        )
        self._thread.start()

    def finish(self) -> Written | None:
        """Wait until the save under way counts or has failed, on all ranks alike; None when it was told of before.

        The monitor is told that this is progress for as long as some rank writes.
        """
        if self._thread is None:
            return None
        seen = -1
        while not self._ended.wait(_LOOK_S):
            if self._signs != seen:
                seen = self._signs
                self._ranks.monitor.moved()
        written, self._written = self._written, None
        return written

    def close(self) -> None:
        """Wait for the removal of what is no longer kept, after `finish`."""
        if self._thread is not None:
            self._thread.join()

    @property
    def done(self) -> bool:
        """Whether `finish` has something to tell and would not wait, here."""
        return self._thread is not None and self._ended.is_set() and self._written is not None

    def _copied(self, tensors: Mapping[str, Rows | Tensor]) -> dict[str, Rows | Tensor]:
        """On the CPU, contiguous. Memory is kept from save to save; not pinned, which would round it up to twice."""
        copies: dict[str, Rows | Tensor] = {}
        kept, self._copies = self._copies, {}
        for name, item in tensors.items():
            source = (item.tensor if isinstance(item, Rows) else item).detach()
            copy = kept.pop(name, None)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype)
            self._copies[name] = copy.copy_(source)
            copies[name] = Rows(copy, item.start, item.total) if isinstance(item, Rows) else copy
        return copies

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _run(self, number: int, tensors: Mapping[str, Rows | Tensor], facts: Facts) -> None:
        began = time.perf_counter()
        folder, token = folder_of(facts.step), f"{self._token}{number:06x}"
        part = f"{folder}/{part_of(self._ranks.rank, token)}"
        told: dict[str, Any] = {}
        outcome = {"error": "", "counts": True}
        try:
            told = write(self._checkpoints.place, part, tensors, self._sign)
        except Exception as raised:  # whatever it is, the other ranks wait for a word
            outcome = {"error": _said(raised, part), "counts": False}
        try:
            outcome = self._agree(number, folder, {"error": outcome["error"], **told}, facts)
        except Exception as raised:  # the store is gone: so is the run. Rank 0 may have let it count.
            outcome["error"] = outcome["error"] or _said(raised, part)
        if not outcome["counts"]:
            with contextlib.suppress(OSError):  # makes room
                self._checkpoints.place.remove(part)
        seconds = time.perf_counter() - began
        self._written = Written(facts.step, str(outcome["error"]), seconds, int(told.get("size", 0)))
        self._ended.set()
        if self._ranks.is_main and not outcome["error"]:
            self._checkpoints.tidy(folder)

    def _sign(self) -> None:
        self._signs += 1
        if self._signs % _SIGN == 0:
            self._ranks.store.add(f"checkpoint/{self._token}/signs", 1)

    def _agree(self, number: int, folder: str, told: dict[str, Any], facts: Facts) -> dict[str, Any]:
        """Tell what was written here, and hear whether all is well; rank 0 decides."""
        store, ranks = self._ranks.store, self._ranks
        keys = [f"checkpoint/{self._token}/{number}/{rank}" for rank in range(ranks.world_size)]
        outcome = f"checkpoint/{self._token}/{number}"
        store.set(keys[ranks.rank], json.dumps(told))
        if ranks.is_main:
            self._wait(keys)
            store.set(outcome, json.dumps(self._decide([json.loads(store.get(key)) for key in keys], folder, facts)))
            for key in keys:
                store.delete_key(key)
        else:
            self._wait([outcome])
        said: dict[str, Any] = json.loads(store.get(outcome))
        if ranks.is_main and number > 1:  # all have read that one: they have begun this one
            store.delete_key(f"checkpoint/{self._token}/{number - 1}")
        return said

    def _decide(self, descriptions: list[dict[str, Any]], folder: str, facts: Facts) -> dict[str, Any]:
        """error: what is wrong; counts: whether the parts are needed, as a manifest names them."""
        error = next((f"rank {r}: {told['error']}" for r, told in enumerate(descriptions) if told["error"]), "")
        if error:
            return {"error": error, "counts": False}
        try:
            self._checkpoints.publish(folder, assembled(descriptions, facts), self._token)
        except Exception as raised:  # as above
            return {"error": _said(raised, folder), "counts": self._may_count(folder)}
        return {"error": "", "counts": True}

    def _may_count(self, folder: str) -> bool:
        try:
            return folder in self._checkpoints.finished()
        except OSError:
            return True

    def _wait(self, keys: list[str]) -> None:
        """By looking: a client that waits in the store would keep the main thread from using it."""
        store, looked = self._ranks.store, time.monotonic()
        while not store.check(keys):
            time.sleep(_POLL_S)
            if time.monotonic() - looked > _LOOK_S * 5:
                looked = time.monotonic()
                self._signs = max(self._signs, _SIGN * store.add(f"checkpoint/{self._token}/signs", 0))


def _said(error: Exception, name: str) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or name}: {error.strerror or error}: make room or mend the folder"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{name}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
