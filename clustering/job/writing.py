"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from clustering.job.together import InputError


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, renamed to it at the end.

    When the block raises, or the disk is full, the new file is removed and an older one of that name stays as it was.
    Raises InputError where the system refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write it ({error.strerror}): make room, or name another place; what was there before is "
            "as it was"
        ) from None
    finally:
        with suppress(OSError):  # it is gone after the renaming, or never was
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """A whole file at once. Raises InputError."""
    with appearing(path) as file:
        file.write(content)
