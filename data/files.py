"""Files that appear whole or not at all; files found, and read in parts."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError


def synced(path: Path) -> None:
    """Until a file's content, or a folder's names, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            synced(name)
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


def refuse_existing(out: Path, names: Iterable[str], *, force: bool) -> None:
    """Raise DataError where a set is, unless it may be replaced: one of `names`, or any record file."""
    there = [name for name in names if (out / name).exists()]
    there += sorted(path.name for path in out.glob("*.rec") if not path.name.startswith("."))  # one of several files
    if there and not force:
        raise DataError(
            f"{out}: expected no set there, found {there[0]}: name another folder, or replace it with --force"
        )


def find_all(places: Sequence[Path], suffix: str) -> list[Path]:
    """Files as they are named, and in their place those of a folder that end with `suffix`, sorted, less hidden ones.

    Raises DataError where there is none, or what has such a name is no file.
    """
    found: list[Path] = []
    for place in places:
        of_it = [place]
        try:
            if place.is_dir():
                of_it = sorted(path for path in place.iterdir() if _is_shown(path, suffix))
        except OSError as error:
            raise DataError(f"{place}: cannot read it ({error.strerror})") from None
        if not of_it or (of_it == [place] and not place.is_file()):
            raise DataError(f"{place}: expected a {suffix} file, or a folder of some, found none")
        if odd := next((path for path in of_it if not path.is_file()), None):
            raise DataError(f"{odd}: expected a {suffix} file, found a folder or a link to nothing: remove or mend it")
        found += of_it
    return found


def _is_shown(path: Path, suffix: str) -> bool:
    return path.name.endswith(suffix) and not path.name.startswith(".")


def identified(paths: Sequence[Path]) -> list[str]:
    """Each file by its path, size and time, to see that it is still the same. Raises DataError for one not there."""
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it ({error.strerror})") from None
    return [f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(paths, stats, strict=True)]


def check_same(paths: Sequence[Path], identity: Sequence[str], numbers: Iterable[int] | None = None) -> None:
    """Raise DataError when a file is not as `identified` saw it. numbers: of the files to look at; None: all."""
    for number in range(len(paths)) if numbers is None else numbers:
        path = paths[number]
        try:
            found = "" if identified([path]) == [identity[number]] else "changed"
        except DataError:
            found = "removed"
        if found:
            raise DataError(
                f"{path}: expected the file that was there at the start, but it was {found} while it was packed: let "
                "it be and give the same command again, which begins anew"
            )


def read_spans(paths: Sequence[Path], spans: Iterable[Sequence[int]]) -> Iterator[bytes]:
    """What some files hold at (number of the file, byte offset, bytes)."""
    number, file = -1, io.BytesIO()
    try:
        for place, offset, size in spans:
            if place != number:
                file.close()
                number, file = place, paths[place].open("rb")  # type: ignore[assignment]
            file.seek(offset)
            yield file.read(size)
    finally:
        file.close()
