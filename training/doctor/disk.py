"""The disk of checkpoints and logs: whether it can be written, how fast, and whether there is room."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from configs.schema import ConfigError, TrainConfig
from data.rec.places import is_address
from data.stores.cache import Cache
from training.doctor.finding import Finding, size_text

_TRIED = 32 << 20
"""Bytes of the timed write."""
_SLOW = 20e6
"""Bytes a second."""


def output(folder: Path, setting: str) -> Finding:
    """Write, bring to the disk and remove a file; folders that were made for it go as well.

    setting: the name of the one that names the folder. Raises ConfigError when that is impossible.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    path = folder / f".doctor_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_speed(_timed_write(path), folder)
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot write {size_text(_TRIED)} to {folder} ({error.strerror}): make room, or choose another "
            f"with --set {setting}=…"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        for empty in made:  # innermost first
            with contextlib.suppress(OSError):
                empty.rmdir()


def _timed_write(path: Path) -> float:
    """Bytes a second, of random bytes, which no file system compresses. Raises OSError."""
    content = os.urandom(_TRIED)
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _TRIED / (time.perf_counter() - began)


def write_speed(speed: float, folder: Path) -> Finding:
    """speed: bytes a second, with fsync."""
    text = f"{folder} can be written, {size_text(speed)} a second reach the disk"
    if speed >= _SLOW:
        return Finding("output", "pass", text)
    return Finding("output", "warn", f"{text}, expected {size_text(_SLOW)}", "choose a faster disk")


def checkpoint_folder(train: TrainConfig) -> Path | None:
    """Where checkpoints go; None: to an object store."""
    if not train.checkpoints:
        return Path(train.output) / "checkpoints"
    return None if is_address(train.checkpoints) else Path(train.checkpoints.removeprefix("file://"))


def free_at(folder: Path) -> int:
    """Free bytes where a folder is, or is going to be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def held_by(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def room(free: int, held: int, checkpoint: int, train: TrainConfig) -> Finding:
    """Free bytes against those of the checkpoints that are kept and one that is being written.

    held: bytes of checkpoints that are there already. checkpoint: bytes of one, of all ranks together.
    """
    kept = train.keep_checkpoints + train.keep_best
    wanted = max(0, (kept + 1) * checkpoint - held)
    text = f"{kept + 1} checkpoints of up to {size_text(checkpoint)}, {kept} of them kept"
    if held:
        text += f", {size_text(held)} of them there"
    if free >= wanted:
        return Finding("disk space", "pass", f"{size_text(free)} free for {text}")
    cure = "make room, lower train.keep_checkpoints or train.keep_best, or --set train.checkpoints=… elsewhere"
    return Finding("disk space", "fail", f"expected {size_text(wanted)} for {text}; found {size_text(free)} free", cure)


def cache(free: int, held: int, cache: Cache, set_bytes: int) -> Finding:
    """Room for blocks of a set that is far away. held: bytes that are in the cache."""
    wanted = max(0, min(cache.limit, set_bytes) - held)
    text = f"{size_text(free)} free in {cache.folder}"
    if free >= wanted:
        return Finding("cache", "pass", text)
    cure = "make room, lower data.cache_gb, or choose another data.cache"
    return Finding("cache", "warn", f"expected {size_text(wanted)} for blocks of the far set, found {text}", cure)
