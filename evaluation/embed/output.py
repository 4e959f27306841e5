"""Where embeddings go: one .npy file that all ranks write into, or a folder with one of each rank. Whole, or not there.

Legend: N rows, D components of an embedding, W ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from data.errors import DataError
from data.files import appearing
from evaluation.embed.sources import Sidecars

_PART = "part-{:05}-of-{:05}.npy"
_IS_PART = re.compile(r"part-[0-9]{5,}-of-[0-9]{5,}\.npy")
_SIDECARS = ("names.txt", "labels.npy")


class Output:
    """x.npy, or a folder x of x/part-00000-of-00008.npy …; beside it what says which image a row is of: x.names.txt,
    x.labels.npy.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        """out: a file if its name ends with .npy, else a folder. force: replace what is there.

        Raises DataError where something is there that may not be replaced: any folder with other files too.
        """
        if out.name in ("", ".."):
            raise DataError(f"--out {out}: expected a name")
        self.path, self.in_parts = out, out.suffix != ".npy"
        self.partial = out.with_name(f".{out.name}.part")
        there = [path for path in (out, *map(self.sidecar, _SIDECARS)) if path.exists()]
        if there and not force:
            what = "folder" if self.in_parts and there[0] == out else "file"
            raise DataError(f"{there[0]}: expected no {what} there: name another, or replace it with --force")
        if folders := [path for path in there if path != out and path.is_dir()]:
            raise DataError(f"{folders[0]}: expected no folder there: name another place")
        if out.is_dir():
            try:
                found = sorted(path.name for path in out.iterdir())
            except OSError as error:
                raise DataError(f"{out}: cannot read it ({error.strerror})") from None
            odd = [name for name in found if not _IS_PART.fullmatch(name)]
            if odd or not self.in_parts:
                what = odd[0] if odd else "a folder"
                raise DataError(f"{out}: expected embeddings to replace, found {what}: name another place")

    def sidecar(self, name: str) -> Path:
        """Path of a file beside it."""
        return self.path.with_name(f"{self.path.name.removesuffix('.npy')}.{name}")

    @contextlib.contextmanager
    def rows(
        self,
        mine: range,
        shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        sidecars: Sidecars,
        group: dist.ProcessGroup,
    ) -> Iterator[BinaryIO]:
        """A file to write the rows `mine` of (N, D) to, one behind the other.

        After the block all is there; where it raises, nothing is left and what was there before is as it was. sidecars:
        written by rank 0. Collectives: three all-reduces of a number. Raises DataError, on every rank, where one cannot
        write.
        """
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        path = self.partial / _PART.format(rank, world_size) if self.in_parts else self.partial
        try:
            with _on_all_ranks(group, self.partial):
                if rank == 0:
                    self._begin(shape, dtype)
            with _on_all_ranks(group, path), path.open("wb" if self.in_parts else "r+b") as file:
                if self.in_parts:
                    _write_header(file, (len(mine), shape[1]), dtype)
                else:
                    np.lib.format.read_magic(file)
                    np.lib.format.read_array_header_1_0(file)
                    file.seek(mine.start * shape[1] * dtype.itemsize, os.SEEK_CUR)
                yield file
                file.flush()
                os.fsync(file.fileno())
            with _on_all_ranks(group, self.path):
                if rank == 0:
                    self._appear(sidecars)
        finally:
            if rank == 0:
                _remove(self.partial)

    def _begin(self, shape: tuple[int, int], dtype: np.dtype[np.generic]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove(self.partial)
        if self.in_parts:
            self.partial.mkdir()
            return
        with self.partial.open("wb") as file:
            _write_header(file, shape, dtype)

    def _appear(self, sidecars: Sidecars) -> None:
        """The embeddings last: where they are, all is there. Where that fails, all that was there is there again."""
        moved: list[tuple[Path, Path]] = []
        try:
            self._write_beside(sidecars, moved)
            self.partial.replace(self.path)
        except BaseException:
            for path, aside in reversed(moved):
                with contextlib.suppress(OSError):
                    aside.replace(path)
            raise
        for _, aside in moved:
            _remove(aside)

    def _write_beside(self, sidecars: Sidecars, moved: list[tuple[Path, Path]]) -> None:
        """The sidecars; what was there is moved aside, which `moved` tells of."""
        paths = [self.sidecar(name) for name in sidecars]
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(appearing(paths)) if paths else []
            for path, content in zip(partial, sidecars.values(), strict=True):
                with path.open("wb") as file:
                    if isinstance(content, bytes):
                        file.write(content)
                    else:
                        np.save(file, content, allow_pickle=False)
            for path in (self.path, *map(self.sidecar, _SIDECARS)):
                if path.exists():
                    aside = path.with_name(f".{path.name}.old")
                    _remove(aside)
                    path.replace(aside)
                    moved.append((path, aside))


def _remove(path: Path) -> None:
    """A file or folder of ours, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _on_all_ranks(group: dist.ProcessGroup, path: Path) -> Iterator[None]:
    """Where the block fails to read or write on one rank, every rank raises DataError. One all-reduce."""
    failure = ""
    try:
        yield
    except OSError as error:
        failure = f"{path}: cannot write it ({error.strerror}): free space, or name another --out"
    except DataError as error:
        failure = str(error)
    failed = torch.tensor([int(bool(failure))])
    if dist.get_backend(group) == "nccl":
        failed = failed.cuda()
    dist.all_reduce(failed, group=group)
    if failure:
        raise DataError(failure) from None
    if int(failed):
        raise DataError(f"{path}: another rank cannot write it: all hosts must reach it")
