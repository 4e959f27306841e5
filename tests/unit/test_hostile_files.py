"""Files made to harm, and every kind of damage: a typed error that says where, no code run, no memory taken.

test_hostile_inputs.py has many inputs for each parser.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.__main__ import main
from data.checking import checksums
from data.checking.checksums import check_hashes, write_hashes
from data.errors import DataError
from data.rec.recordio import HEAD, MAX_LENGTH, CutError, RecordError, RecordReader
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from tests.image_cases import jpeg
from tests.record_files import Record, image_record, insightface_records, write_set

_PAIRS: Any = ([b"\xff\xd8one", b"two", b"3", b"four"], [True, False])


# ---- a set cut at every byte, and changed at every byte ------------------------------------------------------------


def _plain_records() -> list[Record]:
    return [image_record(key, [key % 2], bytes([key]) * (9 + key)) for key in range(5)]


@pytest.mark.parametrize(
    ("records", "classes"), [(_plain_records(), 2), (insightface_records([2, 0, 3]), 3)], ids=["plain", "insightface"]
)
def test_a_set_cut_at_every_byte(tmp_path: Path, records: list[Record], classes: int) -> None:
    folder = write_set(tmp_path, records, classes=classes)
    path = folder / "train.rec"
    content = path.read_bytes()
    starts = [offset for offset, _ in RecordReader(path).scan()]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        last = max((start for start in starts if start <= length), default=0)
        with pytest.raises(RecordError, match=r"train\.rec: byte \d+: expected .*, found .* \(.*python -m data index"):
            RecordSet.open(folder)
        if length in starts:
            assert [offset for offset, _ in RecordReader(path).scan()] == starts[: starts.index(length)]
            continue
        with pytest.raises(CutError) as caught:
            list(RecordReader(path).scan())
        assert caught.value.offset == last
        assert f"train.rec: byte {last}: " in str(caught.value)


def test_every_changed_byte_of_a_set_is_told_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 64)
    folder = write_set(tmp_path, _plain_records(), classes=2)
    (folder / "identities.txt").write_text("one\ntwo\n")
    (folder / "labels.csv").write_text("label,set,old_label,images\n")
    (folder / "lfw.bin").write_bytes(pickle.dumps(_PAIRS))
    write_hashes(folder, threads=1, progress=lambda _: None)
    assert check_hashes(folder, threads=1, progress=lambda _: None) == []
    names = sorted(path.name for path in folder.iterdir() if path.name != "hashes.json")
    assert len(names) == 6
    looked_at = 0
    for name in names:
        content = bytearray((folder / name).read_bytes())
        for place in range(len(content)):
            content[place] ^= 1 << place % 8
            (folder / name).write_bytes(content)
            (fault,) = check_hashes(folder, threads=1, progress=lambda _: None)
            assert (fault.file, fault.begin) == (name, place // 64 * 64)
            assert fault.end == min(place // 64 * 64 + 64, len(content))
            content[place] ^= 1 << place % 8
            looked_at += 1
        (folder / name).write_bytes(content)
    assert looked_at == sum((folder / name).stat().st_size for name in names) > 300
    assert check_hashes(folder, threads=1, progress=lambda _: None) == []


# ---- made to harm --------------------------------------------------------------------------------------------------


def _attacks(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Ways in which a pickle names code or has it called; each would make the file `canary`."""
    call = f"V{canary}\n"
    yield "global", f"cos\nmkdir\n({call}tR.".encode()
    yield "stack global", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(" + call.encode() + b"tR."
    yield "inst", f"({call}ios\nmkdir\n.".encode()
    yield "obj", f"(cos\nmkdir\n{call}o.".encode()
    yield "new object", f"\x80\x02cos\nmkdir\n({call}t\x81.".encode("latin-1")
    yield "in a list", f"](cos\nmkdir\n({call}tRe](\x88e\x86.".encode("latin-1")
    yield "in a dict", f"}}cos\nmkdir\n({call}tRNs.".encode()
    yield (
        "in the state of an array",
        (
            f"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'u1'\ntRI00\ncos\nmkdir\n({call}tRtb."
        ).encode(),
    )
    yield "called by what it may name", f"c_codecs\nencode\n(cos\nmkdir\n({call}tRS'latin1'\ntR.".encode()
    yield "twice", f"cbuiltins\neval\n(V__import__('os').mkdir({str(canary)!r})\ntR.".encode()
    yield "by attribute", f"cbuiltins\ngetattr\n(cos\npath\nS'os'\ntRS'mkdir'\n({call}tR.".encode()
    yield "dotted", b"\x80\x04\x8c\x06_codecs\x8c\x0fencode.__self__\x93."
    yield "of what it may name", b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    yield "extension", b"\x80\x02\x82\x01."
    yield "persistent", f"Pos.mkdir {canary}\n.".encode()


def test_code_in_a_verification_set_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "lfw.bin"
    real = 0
    for name, content in _attacks(canary):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"lfw\.bin: expected a pickle of encoded images"):
            read_bin(path)
        assert not canary.exists(), name
        with contextlib.suppress(Exception):
            pickle.loads(content)
        if canary.exists():
            real += 1
            canary.rmdir()
    assert real >= 8, "the attacks are real ones"


_HUGE = struct.Struct("<Q").pack(1 << 33)
_HUGE_CLAIMS = {
    "frame": b"\x80\x04\x95" + _HUGE,
    "bytes": b"\x80\x04\x8e" + _HUGE,
    "bytearray": b"\x80\x05\x96" + _HUGE,
    "text": b"\x80\x04\x8d" + _HUGE,
    "number": b"\x80\x02\x8b\xff\xff\xff\x7f",
    "shape": b"cnumpy.core.numeric\n_frombuffer\n(C\x011cnumpy\ndtype\n(S'u1'\ntR(I9999999999\nI9999999999\ntS'C'\ntR",
}
_MEASURED = """
import resource, sys
from pathlib import Path
from data.errors import DataError
from data.verification_bin import read_bin
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_bin(Path(path))
    except DataError:
        continue
    sys.exit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_huge_claims_in_a_verification_set_take_no_memory(tmp_path: Path) -> None:
    paths = []
    for name, content in _HUGE_CLAIMS.items():
        paths.append(tmp_path / f"{name}.bin")
        paths[-1].write_bytes(content + b"N.")
    command = [sys.executable, "-c", _MEASURED, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 50_000, "kB, where 8 GB are claimed"


def test_pickles_beside_a_set_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A newer builder leaves a pickled train.meta there: whatever opens the set does not look at it."""
    canary = tmp_path / "canary"
    folder = write_set(tmp_path / "set", [image_record(key, [key % 2], jpeg(key)) for key in range(6)], classes=2)
    meta = f"cos\nmkdir\n(V{canary}\ntR.".encode()
    for name in ("train.meta", "train.lst", "lfw.bin"):
        (folder / name).write_bytes(meta)
    assert RecordSet.open(folder).num_samples == 6
    out = tmp_path / "out"
    for command in (
        ["inspect", str(folder)],
        ["verify", str(folder)],
        ["hash", str(folder)],
        ["check", str(folder)],
        ["verify", str(folder)],
        ["shuffle", str(folder), "--out", str(out / "shuffled")],
        ["convert", str(folder), "--out", str(out / "shards")],
        ["merge", str(folder), str(folder), "--out", str(out / "merged")],
        ["index", str(folder / "train.rec")],
    ):
        assert main(command) == 0, command
    capsys.readouterr()
    assert main(["inspect", str(folder / "lfw.bin")]) == 2
    assert "names os.mkdir, which is refused" in capsys.readouterr().err
    assert not canary.exists()
    with contextlib.suppress(Exception):
        pickle.loads(meta)
    assert canary.exists(), "the attack is a real one"


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("layout", ["plain", "insightface"])
def test_a_huge_count_of_classes_is_refused(layout: str, pair: bool, tmp_path: Path) -> None:
    """Before anything is made in its size."""
    records = _plain_records() if layout == "plain" else insightface_records([2, 0, 3])
    folder = write_set(tmp_path, records, classes=2)
    more = "labels,hi,lo\n" if pair else ""
    for classes in (10**9, 10**17, 10**18 - 1, 10**30):
        (folder / "property").write_text(f"{classes},112,112\n{more}")
        with pytest.raises(DataError) as caught:
            RecordSet.open(folder)
        assert "\n" not in str(caught.value)
        assert re.search(r"property: |two labels|train\.rec: byte \d+", str(caught.value))


def test_a_record_that_claims_half_a_gigabyte(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(HEAD.pack(0xCED7230A, MAX_LENGTH) + b"x" * 8)
    with pytest.raises(CutError, match=r"byte 0: expected 536870912 bytes of payload and padding, found 8"):
        RecordReader(tmp_path / "a.rec").read_at(0)
