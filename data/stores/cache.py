"""Where copies of what is far away or slow to find out are kept, on a local disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_VERSION = 1
VARIABLE = "CLUSTERFACE_CACHE"
LIMIT_GB = 200
_KINDS = ("keys", "offsets", "labels")
Keys = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Cache(NamedTuple):
    """folder; limit: bytes that blocks of far files may take there, all together."""

    folder: Path
    limit: int = LIMIT_GB * 10**9

    @classmethod
    def default(cls) -> Cache:
        """$CLUSTERFACE_CACHE, or `clusterface` in the user's cache folder."""
        return cls(default_folder())


def default_folder() -> Path:
    """See `Cache.default`."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "clusterface"
    try:
        return Path.home() / ".cache" / "clusterface"
    except RuntimeError:  # no home, as in containers
        return Path(tempfile.gettempdir()) / f"clusterface-{os.getuid()}"


class Table(NamedTuple):
    """What opening a set finds out: N images of F record files, one file behind the other.

    layout: its name. counts: images of each file. keys: int32 or int64 (N,). offsets, labels: int64 (N,).
    """

    layout: str
    counts: list[int]
    keys: Keys
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def stamp(facts: object) -> str:
    """A name for what some facts, of which JSON is made, identify."""
    return hashlib.sha256(json.dumps([_VERSION, facts], sort_keys=True).encode()).hexdigest()[:40]


def load_table(folder: Path) -> Table | None:
    """A table that was kept, memory-mapped, so that all ranks of a host hold it once; None: there is none."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="ascii"))
        arrays = [
            np.load(folder / f"{kind}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for kind in _KINDS
        ]
        table = Table(facts["layout"], facts["counts"], *arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    right = all(array.dtype.kind == "i" and array.shape == (sum(table.counts),) for array in arrays)
    return table if right else None


def keep_only(folder: Path) -> None:
    """Remove what lies beside a folder: the same of before something changed."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)


def table_folder(cache: Cache, address: str, name: str) -> Path:
    """For the table of that name, and no other of the set at that address."""
    return cache.folder / "sets" / stamp(address) / name


def keep_table(to: Path, table: Table) -> None:
    """Keep it, if there is room: it can be found out again. The table of before is removed."""
    with contextlib.suppress(OSError):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=".partial.", ignore_cleanup_errors=True) as partial:
            made = Path(partial) / "table"
            made.mkdir()
            for kind, array in zip(_KINDS, table[2:], strict=True):
                np.save(made / f"{kind}.npy", array)
            facts = {"layout": table.layout, "counts": table.counts}
            (made / "facts.json").write_text(json.dumps(facts), encoding="ascii")
            made.rename(to)  # fails where another rank was faster
        keep_only(to)
