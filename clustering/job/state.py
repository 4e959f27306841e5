"""What an interrupted job goes on from: a folder beside its output, whole after every iteration.

`state.json` names the arrays that belong to it and is renamed into place after them, so whatever moment a job is ended
at, the folder holds one iteration in full.

Legend: S rows of one rank's shard, D columns, K clusters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.job.sharded_files import read_sharded, write_sharded
from clustering.job.together import InputError, on_rank_zero, raise_together
from clustering.job.writing import write_bytes

_FILE = "state.json"
_MOST_BYTES = 1 << 26


class JobState:
    """Arrays sharded over the ranks, and plain values, in a folder that rank 0 writes and reads."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], group: dist.ProcessGroup, device: torch.device):
        """fingerprint: data and settings that must be the same for a job to go on. No collective."""
        self.folder, self.fingerprint, self._group, self._device = folder, fingerprint, group, device

    def write(self, number: int, values: dict[str, Any], arrays: dict[str, tuple[Tensor, int]]) -> None:
        """Replace what is there. number: of the iteration. arrays: by name (S, D) float32 or int64, and rows in all.

        Raises InputError on all ranks where it cannot be written. Collectives: those of `write_sharded` for each array,
        one all-reduce.
        """
        names = {name: f"{name}-{number}.npy" for name in arrays}
        for name, (own_SD, total) in arrays.items():
            dtype = np.int64 if own_SD.dtype == torch.int64 else np.float32
            write_sharded(self.folder / names[name], own_SD, total, self._group, dtype=dtype)
        told = {"fingerprint": self.fingerprint, "number": number, "values": values, "arrays": names}

        def finish() -> None:
            write_bytes(self.folder / _FILE, (json.dumps(told, indent=1) + "\n").encode())
            for path in self.folder.iterdir():
                if path.name not in {_FILE, *names.values()}:
                    path.unlink(missing_ok=True)

        on_rank_zero(finish, self._group, self._device)

    def read(self) -> dict[str, Any] | None:
        """The values last written, on all ranks, with `number`; None where there are none.

        Raises InputError on all ranks when the folder is of another job or damaged. Collectives: one broadcast, one
        all-reduce.
        """
        error, content = "", b""
        if dist.get_rank(self._group) == 0:
            try:
                content = self._content()
            except InputError as raised:
                error = str(raised)
        raise_together(error, self._group, self._device)
        length = torch.tensor(len(content), device=self._device)
        dist.broadcast(length, group=self._group, group_src=0)
        if not int(length):
            return None
        words = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if content:
            words.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(words, group=self._group, group_src=0)
        told: dict[str, Any] = json.loads(bytes(words.tolist()))
        return {**told["values"], "number": told["number"], "arrays": told["arrays"]}

    def array(
        self, state: dict[str, Any], name: str, total: int, dim: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """This rank's shard of an array (total, dim) of that state. Collectives: those of `read_sharded`."""
        path = self.folder / str(state["arrays"].get(name))
        return read_sharded(path, total, dim, self._group, self._device, dtype=dtype)

    def _content(self) -> bytes:
        path = self.folder / _FILE
        try:
            if not path.exists():
                return b""
            content = path.read_bytes()[:_MOST_BYTES]
            told = json.loads(content)
            theirs = dict(told["fingerprint"])
            if not isinstance(told["number"], int) or not isinstance(told["values"], dict):
                raise TypeError("number and values")
            names = list(dict(told["arrays"]).values())
            if any(Path(name).name != name for name in names):
                raise ValueError("a file of another folder")
        except OSError as error:
            raise InputError(f"{path}: cannot read it ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"{path}: damaged: start over with --force") from None
        for name in sorted(self.fingerprint.keys() | theirs.keys()):
            there, here = theirs.get(name), self.fingerprint.get(name)
            if there != here:
                raise InputError(
                    f"{self.folder}: holds an unfinished job with {name} {there}, this one has {here}: use the same "
                    "data and settings to go on, name another --out, or start over with --force"
                )
        return content

    def remove(self) -> None:
        """At the end of the job. Raises InputError on all ranks. One all-reduce."""

        def work() -> None:
            try:
                if self.folder.exists():
                    shutil.rmtree(self.folder)
            except OSError as error:
                raise InputError(f"{self.folder}: cannot remove it ({error.strerror}): remove it yourself") from None

        on_rank_zero(work, self._group, self._device)
