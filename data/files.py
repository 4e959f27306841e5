"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError


@contextmanager
def appearing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names to write to, in the folders of `paths`, renamed to `paths` in that order at the end.

    When the block raises, nothing is left behind and older files of these names stay as they were. The last path is
    the one whose presence says that all is there (an index): an old one is removed before the first rename, so
    that it can never stand beside new files. Raises DataError when a folder cannot be made or written.
    """
    partial = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for name in partial:
            with name.open("rb") as file:
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for name, path in zip(partial, paths, strict=True):
            name.replace(path)
    except OSError as error:
        raise DataError(f"{error.filename or paths[0]}: cannot write it ({error.strerror})") from None
    finally:
        for name in partial:
            if name.exists():
                name.unlink()
