"""Embeddings in .npy files: what is read, what is refused, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from clustering.job.files import FileRows, unit_rows
from clustering.job.together import InputError
from clustering.job.writing import appearing, write_bytes
from clustering.service.parts import PartFiles, contains, natural
from tests.ranks import RankPool

CPU = torch.device("cpu")


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path, generator: np.random.Generator) -> Path:
    """Parts of 3, 0, 7 and 2 rows, of different dtypes, in natural order; the whole of them is whole.npy beside."""
    parts = tmp_path / "parts"
    parts.mkdir()
    kinds = [("p1", 3, np.float16), ("p2", 0, np.float32), ("p9", 7, np.float32), ("p10", 2, np.float16)]
    matrices = [generator.standard_normal((rows, 5)).astype(dtype) for _, rows, dtype in kinds]
    for (name, _, _), matrix in zip(kinds, matrices, strict=True):
        np.save(parts / f"{name}.npy", matrix)
    (parts / "notes.txt").write_text("not a part")
    np.save(tmp_path / "whole.npy", np.concatenate([matrix.astype(np.float32) for matrix in matrices]))
    return parts


def test_natural_order() -> None:
    assert sorted(["p10", "p9", "p1b", "q", "7", "p01"], key=natural) == ["7", "p01", "p1b", "p9", "p10", "q"]


def test_parts_are_one_matrix(folder: Path) -> None:
    files, whole = PartFiles(folder), np.load(folder.parent / "whole.npy")
    assert (files.rows, files.dim) == whole.shape
    for start in range(13):
        for stop in range(start, 13):
            assert np.array_equal(files.read(start, stop), whole[start:stop])
    row_Q = np.array([11, 0, 3, 3, 2, 10])
    assert np.array_equal(files.take(row_Q), whole[row_Q])
    assert files.where(4) == f"row 1 of {folder / 'p9.npy'}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_kinds_of_numbers(tmp_path: Path, generator: np.random.Generator, dtype: str, order: Any) -> None:
    matrix = np.asarray(generator.standard_normal((6, 3)), order=order).astype(dtype, order=order)
    np.save(tmp_path / "x.npy", matrix)
    read = PartFiles(tmp_path / "x.npy").read(1, 6)
    assert read.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert np.array_equal(read, matrix[1:6].astype(np.float64))


def test_unit_rows_of_any_length() -> None:
    x_bD = torch.tensor([[3.0, 4.0], [0, 0], [1e-300, 0], [1e300, 1e300], [5e-324, 0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5], [1, 0]])
    assert torch.allclose(unit_rows(x_bD), expected)
    small_bD = torch.tensor([[1e-45, 0], [3e38, 3e38]])
    assert torch.allclose(unit_rows(small_bD), torch.tensor([[1.0, 0], [0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize("dim", [1, 7, 123, 252, 507])
def test_a_row_has_the_same_bits_in_any_company(dim: int) -> None:
    x_ND = torch.randn(300, dim)
    whole_ND = unit_rows(x_ND)
    assert (whole_ND.double().norm(dim=1) - 1).abs().max() < 1e-6
    for start, stop in ((0, 1), (7, 8), (5, 136), (299, 300)):
        assert torch.equal(unit_rows(x_ND[start:stop]), whole_ND[start:stop])


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as raised:
        PartFiles(path)
    text = str(raised.value)
    assert "\n" not in text
    for part in (str(path), *parts):
        assert part in text


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    _refused(path, "cannot read it")
    for content in (b"", b"hello", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff{"):
        path.write_bytes(content)
        _refused(path, "not an .npy file")
    for array in (
        np.zeros(4, np.float32),
        np.zeros((2, 3, 4), np.float32),
        np.zeros((2, 3), np.int64),
        np.zeros((2, 0), np.float32),
        np.float32(1),
        np.zeros((2, 3), np.complex64),
    ):
        np.save(path, array)
        _refused(path, "expected float16, float32 or float64 of shape (rows, components)")
    np.save(path, np.zeros((0, 3), np.float32))
    _refused(path, "0 rows")
    np.save(path, np.array([[{}, 1]], dtype=object), allow_pickle=True)
    _refused(path, "expected numbers")
    np.save(path, np.zeros((4, 3), np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    _refused(path, "cut short", str(len(whole)))
    path.write_bytes(whole + b"0")
    _refused(path, "longer")
    with path.open("wb") as file:
        np.savez(file, x=np.zeros((2, 3)))
    _refused(path, "not an .npy file")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "expected .npy files")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match=r"b.npy: expected rows of 3 components as in a.npy, got 4"):
        PartFiles(tmp_path)


def test_what_would_be_read_as_a_part(tmp_path: Path) -> None:
    assert contains(tmp_path, tmp_path / "out.npy")
    assert contains(tmp_path / "x.npy", tmp_path / "x.npy")
    assert not contains(tmp_path / "x.npy", tmp_path / "out.npy")
    assert not contains(tmp_path, tmp_path / "deeper" / "out.npy")


def _rows(group: dist.ProcessGroup, path: Path, in_memory: bool) -> tuple[Any, ...]:
    rows = FileRows(PartFiles(path), group=group, device=CPU, in_memory=in_memory)
    rows.in_memory = in_memory
    read: list[int] = []
    survey = rows.survey(read.append)
    index_Q = torch.arange(len(rows) - 1, -1, -1)
    return rows.block(0, len(rows)), rows.take(index_Q).flip(0), survey, sum(read)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_of_all_ranks(ranks: RankPool, folder: Path, world_size: int) -> None:
    whole_ND = unit_rows(torch.from_numpy(np.load(folder.parent / "whole.npy")))
    surveys = set()
    for in_memory in (False, True):
        found = ranks.run(world_size, _rows, folder, in_memory)
        for which in (0, 1):
            assert torch.equal(torch.cat([part[which] for part in found]), whole_ND)
        surveys |= {part[2] for part in found}
        assert sum(part[3] for part in found) == 12
    (survey,) = surveys
    assert survey.zero_rows == 0
    assert survey == ranks.run(1, _rows, folder.parent / "whole.npy", True)[0][2], "the same rows in one file"


def _survey_error(group: dist.ProcessGroup, path: Path) -> str:
    try:
        _rows(group, path, False)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_that_are_not_finite(ranks: RankPool, folder: Path, world_size: int) -> None:
    matrix = np.load(folder / "p9.npy")
    matrix[[1, 5], [0, 4]] = [np.nan, -np.inf]
    np.save(folder / "p9.npy", matrix)
    (error,) = set(ranks.run(world_size, _survey_error, folder))
    for part in ("2 of 12 rows", "4, 8", f"row 1 of {folder / 'p9.npy'}"):
        assert part in error


def test_zero_rows_and_the_checksum(ranks: RankPool, tmp_path: Path) -> None:
    matrix = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
    surveys = []
    for changed in (matrix, matrix[::-1], np.where(matrix == 5, 6, matrix), np.where(matrix < 5, 0, matrix)):
        np.save(tmp_path / "x.npy", changed)
        surveys.append(ranks.run(2, _rows, tmp_path / "x.npy", False)[0][2])
    assert [survey.zero_rows for survey in surveys] == [0, 0, 0, 2]
    assert len({survey.checksum for survey in surveys}) == 4


class _FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, content: bytes) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": _FullDisk(opened(path, mode), 100))
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "centres.npy"
    write_bytes(path, b"old")
    with pytest.raises(InputError, match=r"centres.npy: cannot write it \(No space left on device\): make room"):
        write_bytes(path, b"n" * 101)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["centres.npy"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with appearing(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write it"):
        write_bytes(tmp_path / "file" / "x", b"")
