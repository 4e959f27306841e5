"""Centres of other classes, filled in blocks; files that centres come from, whole and damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.errors import DataError
from training.checkpoint import CheckpointError
from training.warm import class_centres
from training.warm.class_centres import FileCentres, fill
from training.warm.class_map import ClassMap
from training.warm.safetensors_file import read_tensors


@dataclass
class _Blocks:
    """Centres in uneven blocks, as the files of ranks are."""

    w_CD: Tensor
    sizes: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        return len(self.w_CD)

    @property
    def dim(self) -> int:
        return self.w_CD.shape[1]

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        first = 0
        for size in self.sizes:
            yield first, self.w_CD[first : first + size]
            first += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(123,), (1, 0, 60, 62)])
def test_filled_as_row_by_row_in_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(class_centres, "BLOCK", 3)
    draw = np.random.default_rng(7)
    old_CD = torch.randn(123, 7) * torch.rand(123, 1) * 9
    new_P, old_P = draw.integers(0, 80, 60), draw.permutation(123)[:60]
    weight_P = draw.integers(1, 30, 60).astype(np.float64)
    classes = ClassMap(num_classes=80, num_old=123, new_P=new_P, old_P=old_P, weight_P=weight_P)
    before_CD = torch.randn(80, 7).to(dtype)
    weight_CD = before_CD.clone()
    length = fill(weight_CD, _Blocks(old_CD, sizes), classes)

    exact_CD = old_CD.double().numpy()
    lengths_C = np.linalg.norm(exact_CD, axis=1)
    assert length == pytest.approx(lengths_C[old_P].mean(), rel=1e-6)
    kinds = set()
    for label in range(80):
        mine = np.flatnonzero(new_P == label)
        kinds.add(min(2, len(mine)))
        if len(mine) == 0:
            assert torch.equal(weight_CD[label], before_CD[label])
        elif len(mine) == 1:
            assert torch.equal(weight_CD[label], old_CD[old_P[mine[0]]].to(dtype))
        else:
            units = exact_CD[old_P[mine]] / lengths_C[old_P[mine], None]
            joined = (weight_P[mine, None] * units).sum(0)
            expected = torch.from_numpy(joined / np.linalg.norm(joined) * lengths_C[old_P].mean())
            error = 1e-5 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(weight_CD[label].double(), expected, rtol=0, atol=error * length)
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_exported_centres_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(class_centres, "BLOCK", 4)
    centres_CD, path = torch.randn(11, 5), tmp_path / f"centres{suffix}"
    writers: dict[str, Callable[[Path], object]] = {
        ".npy": lambda path: np.save(path, centres_CD.numpy().astype(">f4")),
        ".pt": lambda path: torch.save({"centres": centres_CD}, path),
        ".safetensors": lambda path: save_file({"centres": centres_CD}, path),
    }
    writers[suffix](path)
    found = FileCentres.of(path)
    assert (found.num_classes, found.dim) == (11, 5)
    blocks = list(found.rows())
    assert [first for first, _ in blocks] == [0, 4, 8]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), centres_CD)
    centres_CD[7, 2] = torch.nan
    writers[suffix](path)
    with pytest.raises(CheckpointError, match="not finite"):
        list(FileCentres.of(path).rows())


def test_files_that_hold_no_centres_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, 2), np.int64))
    torch.save({"centres": torch.zeros(3)}, tmp_path / "flat.pt")
    torch.save(torch.zeros(3, 2), tmp_path / "bare.pt")
    save_file({"weights": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "random.pt").write_bytes(np.random.default_rng(0).bytes(500))
    (tmp_path / "empty.npy").touch()
    for path in [*tmp_path.iterdir(), tmp_path / "none.pt", tmp_path / "none.npy", tmp_path / "none.safetensors"]:
        with pytest.raises((CheckpointError, DataError), match=str(path)) as raised:
            FileCentres.of(path)
        assert len(str(raised.value).splitlines()) == 1


def test_safetensors_are_read_as_their_library_wrote_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 3, 1),
        "b.c": torch.randn(5).to(torch.bfloat16),
        "count": torch.tensor(12),
        "none": torch.zeros(0, 4),
        "half": torch.randn(3).half(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def _file(header: object, content: bytes = b"\0" * 16) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + content


def _entry(shape: object, offsets: object, dtype: object = "F32") -> object:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2",
        struct.pack("<Q", 1 << 63) + b"{}",
        _file(b"{"),
        _file(b"[" * 100_000),
        _file([]),
        _file({"a": 1}),
        _file({"a": {}}),
        _file(_entry([4], [0, 16], "X")),
        _file(_entry([4], [0, 16], ["F32"])),
        _file(_entry([5], [0, 20])),
        _file(_entry([4], [4, 20])),
        _file(_entry([4], [0, 12])),
        _file(_entry([4], [16, 0])),
        _file(_entry([-4], [0, -16])),
        _file(_entry([4.0], [0, 16])),
        _file(_entry(4, [0, 16])),
        _file(_entry([4], [0])),
        _file(_entry([1 << 62, 1 << 62], [0, 16])),
    ],
)
def test_damaged_safetensors_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or not a file of safetensors") as raised:
        read_tensors(path)
    assert len(str(raised.value).splitlines()) == 1
