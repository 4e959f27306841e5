"""Verification sets: what numpy and Python 2 wrote is read, code in a pickle is refused and does not run."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.verification_bin import read_bin, write_bin

IMAGES = [b"\xff\xd8one", b"\xff\xd8two\x00", b"3", bytes(range(256))]
SAME = [True, False]


def _dump(tmp_path: Path, content: Any, protocol: int = 4) -> Path:
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def test_what_we_write_plain_pickle_reads(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", IMAGES, np.array(SAME))
    with (tmp_path / "a.bin").open("rb") as file:
        images, same = pickle.load(file)
    assert (images, same) == (IMAGES, SAME)
    assert {type(image) for image in images} == {bytes}
    assert {type(value) for value in same} == {bool}
    again = read_bin(tmp_path / "a.bin")
    assert again.images == IMAGES
    np.testing.assert_array_equal(again.same, SAME)
    assert again.same.dtype == np.bool_
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "array", "tuple"])
def test_every_protocol_and_kind_of_image(tmp_path: Path, protocol: int, kind: str) -> None:
    images: Any = IMAGES
    same: Any = SAME
    if kind == "array":
        images, same = [np.frombuffer(image, np.uint8) for image in IMAGES], [np.bool_(value) for value in SAME]
    if kind == "tuple":
        images, same = tuple(IMAGES), np.array(SAME)
    read = read_bin(_dump(tmp_path, (images, same), protocol))
    assert read.images == IMAGES
    assert read.same.tolist() == SAME


def test_numpy_1_names(tmp_path: Path) -> None:
    """Sets written by numpy 1 name numpy.core; pickle.dumps of numpy 2 differs from it in this name only."""
    path = tmp_path / "old.bin"
    content = pickle.dumps(([np.frombuffer(image, np.uint8) for image in IMAGES], SAME), 2)
    assert b"numpy._core" in content
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert read_bin(path).images == IMAGES


def test_python_2(tmp_path: Path) -> None:
    """Python 2 wrote str, opcode U (protocol 2) or a quoted line (protocol 0), where Python 3 writes bytes."""
    short = b"".join(b"U" + bytes([len(image)]) + image for image in IMAGES[:2])
    (tmp_path / "p2.bin").write_bytes(b"\x80\x02](" + short + b"e](\x88e\x86.")
    assert read_bin(tmp_path / "p2.bin").images == IMAGES[:2]
    (tmp_path / "p0.bin").write_bytes(b"((lp0\nS'\\xff\\xd8one'\naS'two'\na(lp1\nI01\natp2\n.")
    assert read_bin(tmp_path / "p0.bin") == ([b"\xff\xd8one", b"two"], np.array([True]))


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    path = _dump(tmp_path, ([_Evil(), b"x"], [True]), protocol)
    with pytest.raises(DataError, match=rf"set\.bin: .*names {os.system.__module__}\.system, which is refused"):
        read_bin(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists(), "the attack is a real one"


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy frombuffer", "numpy.core.multiarray scalar\x00", "copyreg _r"]
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "set.bin"
    path.write_bytes(f"c{name.replace(' ', chr(10))}\n.".encode())
    with pytest.raises(DataError, match="refused"):
        read_bin(path)


@pytest.mark.parametrize(
    "content",
    [
        # What crashes numpy's own functions: eight raw bytes as an object.
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRC\x0812345678tR.",
        b"cnumpy.core.numeric\n_frombuffer\n(C\x0812345678cnumpy\ndtype\n(S'O'\ntR(I1\ntS'C'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR(I1\n(I9\ntcnumpy\ndtype\n(S'u1'\ntRI00\nC\x0812345678tb.",
        b"cnumpy.core.multiarray\n_reconstruct\n}b.",
        b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR(I1\n(I1000000000000\ntcnumpy\ndtype\n(S'u1'\ntRI00\nC\x011tb.",
        b"c_codecs\nencode\n(Vx\nS'rot13'\ntR.",
    ],
)
def test_crafted_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set\.bin: expected a pickle"):
        read_bin(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGES, [True]), "found 4 images and 1 pairs"),
        ((IMAGES[:3], [True]), "found 3 images and 1 pairs"),
        (([], []), "found 0 images and 0 pairs"),
        ((IMAGES, SAME, 1), "expected a pair"),
        ({"a": 1}, "a dict or a set"),
        ("text", "expected a pair"),
        ((IMAGES, "no"), "expected a list of same"),
        (([*IMAGES[:3], b""], SAME), "image 3: expected encoded bytes"),
        (([*IMAGES[:3], "text"], SAME), "image 3: expected encoded bytes"),
        (([*IMAGES[:3], np.zeros((2, 2), np.uint8)], SAME), "image 3: expected encoded bytes"),
        (([*IMAGES[:3], np.zeros(2)], SAME), "array of 'f8'"),
        ((IMAGES, [True, 2]), "expected booleans"),
        ((IMAGES, [True, None]), "expected booleans"),
    ],
)
def test_what_is_no_verification_set(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_bin(_dump(tmp_path, content))


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.bin: cannot read it"):
        read_bin(tmp_path / "none.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write it"):
        write_bin(tmp_path / "file" / "a.bin", IMAGES, SAME)
    with pytest.raises(DataError, match="found 4 images and 3 pairs"):
        write_bin(tmp_path / "a.bin", IMAGES, [True] * 3)
    assert not (tmp_path / "a.bin").exists()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_raises_data_error_or_reads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    blob = bytearray(pickle.dumps((arrays, SAME), data.draw(st.sampled_from([0, 2, 4]))))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob)
    with contextlib.suppress(DataError):
        images, same = read_bin(path)
        assert len(images) == 2 * len(same)


def test_huge_claims_allocate_nothing(tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")
    with pytest.raises(DataError):
        read_bin(tmp_path / "set.bin")


_DEEP = b")" + b"\x85" * 2_000_000
_NUMBER = b"\x8b" + struct.pack("<i", 3_000_000) + b"\x01" * 3_000_000


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04Nr" + struct.pack("<I", (1 << 32) - 1) + b".",  # 64 GB for the places of the memo
        b"\x80\x04}" + _DEEP + b"Ns.",  # hashing crashes the process
        b"\x80\x04\x8f(" + _DEEP + b"\x90.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"N.",
        b"cnumpy.core.numeric\n_frombuffer\n(C\x011cnumpy\ndtype\n(S'u1'\ntR("
        + _NUMBER * 3
        + b"tS'C'\ntR.",  # for hours
    ],
    ids=["memo", "dict", "set", "bytearray", "shape"],
)
def test_small_files_take_no_memory_no_time_and_no_process(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_bin(path)
