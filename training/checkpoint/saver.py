"""Checkpoints written beside training: the state is copied, and a thread of each rank writes the copy.

    main thread     copies the state, and goes on training
    every rank      writes its part, brings it to the disk, and tells so in the run's store
    rank 0          when all have: manifest, `latest`, and tells so

No collective is run, so nothing comes between those of training. A run that dies on the way leaves the former
checkpoint, named by `latest`, whole.
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
from training.checkpoint.manifest import assembled
from training.checkpoint.part import write
from training.distributed import Ranks

_POLL_S = 0.02


class Written(NamedTuple):
    """What became of one save, the same words on all ranks."""

    step: int
    error: str
    """Nothing when it counts."""
    blocked: float
    """Seconds for which training stood still here."""
    seconds: float
    """Until it counted."""
    nbytes: int
    """Of this rank."""


class Saver:
    """Saves one checkpoint at a time. Every rank makes one and calls it alike."""

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks, token: str) -> None:
        """token: hexadecimal digits, the same on all ranks and of this run alone."""
        self._checkpoints, self._ranks, self._token = checkpoints, ranks, token
        self._saves = 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._written: Written | None = None

    def save(self, step: int, tensors: Mapping[str, Rows | Tensor], values: dict[str, Any]) -> Written | None:
        """Copy the state and begin to write it; what became of the save before, if that was not asked for yet.

        tensors: `Rows` of this rank, or plain ones, the same on all ranks, of which rank 0's are taken. values: as JSON
        has them; rank 0's are taken. Waits for the save before. No collective.
        """
        began = time.perf_counter()
        before = self.finish()
        own = {
            name: item for name, item in tensors.items() if self._ranks.is_main or isinstance(item, Rows)
        }  # an empty shard too: the manifest needs the shape
        copies = self._copied(own)
        self._saves += 1
        blocked = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._run,
            args=(self._saves, step, copies, values, blocked),
            name="checkpoint",
            daemon=True,  # a run that ends by an error must not wait here for ranks that are gone
        )
        self._thread.start()
        return before

    def finish(self) -> Written | None:
        """Wait until the save under way counts or has failed, on all ranks alike; None when there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        written, self._written = self._written, None
        return written

    @property
    def done(self) -> bool:
        """Whether `finish` has something to tell and would not wait, here."""
        return self._thread is not None and not self._thread.is_alive()

    def _copied(self, tensors: Mapping[str, Rows | Tensor]) -> dict[str, Rows | Tensor]:
        """On the CPU, contiguous. Memory is kept from save to save; pinned for GPUs."""
        copies: dict[str, Rows | Tensor] = {}
        kept, self._copies = self._copies, {}
        cuda = self._ranks.device.type == "cuda"
        for name, item in tensors.items():
            source = (item.tensor if isinstance(item, Rows) else item).detach()
            copy = kept.pop(name, None)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=cuda and source.is_cuda)
            copy.copy_(source, non_blocking=True)
            self._copies[name] = copy
            copies[name] = Rows(copy, item.start, item.total) if isinstance(item, Rows) else copy
        if cuda:
            torch.cuda.current_stream(self._ranks.device).synchronize()
        return copies

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _run(
        self,
        number: int,
        step: int,
        tensors: Mapping[str, Rows | Tensor],
        values: dict[str, Any],
        blocked: float,
    ) -> None:
        began = time.perf_counter()
        folder, token = folder_of(step), f"{self._token}{number:06x}"
        part = f"{folder}/{part_of(self._ranks.rank, token)}"
        told: dict[str, Any] = {}
        error = ""
        try:
            told = write(self._checkpoints.place, part, tensors)
        except Exception as raised:  # whatever it is, the other ranks wait for a word
            error = _said(raised, part)
        try:
            error = self._agree(number, folder, step, {"error": error, **told}, values)
        except Exception as raised:  # the store is gone: so is the run
            error = error or _said(raised, part)
        if error:
            with contextlib.suppress(OSError):  # makes room
                self._checkpoints.place.remove(part)
        seconds = blocked + time.perf_counter() - began
        self._written = Written(step, error, blocked, seconds, int(told.get("size", 0)))

    def _agree(
        self,
        number: int,
        folder: str,
        step: int,
        told: dict[str, Any],
        values: dict[str, Any],
    ) -> str:
        """Tell what was written here, and hear whether all is well; rank 0 decides."""
        store, ranks = self._ranks.store, self._ranks
        keys = [f"checkpoint/{self._token}/{number}/{rank}" for rank in range(ranks.world_size)]
        outcome = f"checkpoint/{self._token}/{number}"
        store.set(keys[ranks.rank], json.dumps(told))
        if ranks.is_main:
            self._wait(keys)
            descriptions = [json.loads(store.get(key)) for key in keys]
            error = next((f"rank {r}: {told['error']}" for r, told in enumerate(descriptions) if told["error"]), "")
            if not error:
                try:
                    self._checkpoints.publish(folder, assembled(descriptions, step, time.time(), values))
                except Exception as raised:  # as above
                    error = _said(raised, folder)
            store.set(outcome, json.dumps(error))
            for key in keys:
                store.delete_key(key)
        else:
            self._wait([outcome])
        said: str = json.loads(store.get(outcome))
        if ranks.is_main and number > 1:  # all have read that one: they have begun this one
            store.delete_key(f"checkpoint/{self._token}/{number - 1}")
        return said

    def _wait(self, keys: list[str]) -> None:
        """By looking: a client that waits in the store would keep the main thread from using it."""
        while not self._ranks.store.check(keys):
            time.sleep(_POLL_S)


def _said(error: Exception, name: str) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or name}: {error.strerror or error}"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{name}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
