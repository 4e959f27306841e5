"""A disk of its own that can be made full and empty again: a tmpfs, which needs root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType

_PAGE = 4096
_ROOMY = 64 << 20


class Disk:
    """Mounted at a folder; a context manager. Raises OSError where that cannot be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={_ROOMY}", "tmpfs", str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run("umount", "-l", str(self.folder))

    def leave(self, room: int) -> None:
        """Make it so small that only so many bytes are free."""
        now = os.statvfs(self.folder)
        pages = now.f_blocks - now.f_bfree + room // _PAGE
        _run("mount", "-o", f"remount,size={pages * _PAGE}", str(self.folder))

    def grow(self) -> None:
        """Make it large again."""
        _run("mount", "-o", f"remount,size={_ROOMY}", str(self.folder))


def pages(sizes: list[int]) -> int:
    """Bytes that files of such sizes take."""
    return sum(-(-size // _PAGE) * _PAGE for size in sizes)


def _run(*command: str) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
