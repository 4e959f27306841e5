"""Files that a first refresh cannot start from, each refused in one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from clustering.service.start import read_start
from configs.schema import ConfigError


def _read(path: Path) -> npt.NDArray[np.integer]:
    found = read_start(str(path), num_samples=7, num_clusters=3)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16])
def test_whole_numbers_of_any_width(tmp_path: Path, dtype: Any) -> None:
    cluster_N: npt.NDArray[Any] = np.array([0, 2, 1, 1, 0, 2, 2], dtype=dtype)
    np.save(tmp_path / "a.npy", cluster_N)
    found = _read(tmp_path / "a.npy")
    assert found.tolist() == cluster_N.tolist()
    assert not found.flags.writeable


def test_minus_one_is_no_cluster(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full(7, -1))
    assert _read(tmp_path / "a.npy").tolist() == [-1] * 7


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(7), "expected an array of whole numbers with one dimension, got float64 (7,)"),
        (np.zeros((7, 1), dtype=int), "got int64 (7, 1)"),
        (np.zeros((3, 512), dtype=np.float32), "not the centres"),
        (np.zeros(7, dtype=bool), "got bool (7,)"),
        (np.zeros((), dtype=int), "got int64 ()"),
        (np.zeros(6, dtype=int), "expected a cluster for each of the 7 samples of data.path, got 6"),
        (np.array([], dtype=int), "samples of data.path, got 0"),
        (np.array([0, 1, 2, -2, 0, 0, 0]), "expected clusters from 0, or -1 for none, got -2"),
        (np.array([0, 1, 3, 0, 0, 0, 0]), "got 4: make it with --k 3, or raise clustering.extra_clusters"),
        (np.array([0, 1, 2**64 - 1, 0, 0, 0, 0], dtype=np.uint64), f"got {2**64}: make it with --k 3"),
        (np.array([None] * 7), "cannot read it"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: npt.NDArray[Any], said: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError) as error:
        _read(tmp_path / "a.npy")
    assert str(error.value).startswith(f"clustering.start: {tmp_path / 'a.npy'}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "archive.npz", a=np.zeros(7, dtype=int))
    np.save(tmp_path / "cut.npy", np.zeros(7, dtype=int))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-9])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("0 1 2\n")
    for name in ("archive.npz", "cut.npy", "empty.npy", "text.npy", "nowhere.npy", "."):
        with pytest.raises(ConfigError, match="python -m clustering kmeans") as error:
            _read(tmp_path / name)
        assert "\n" not in str(error.value)
