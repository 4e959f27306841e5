"""`python -m data verify` with a hashes.json beside the set: whatever is not as it says is found, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.__main__ import main
from data.checking import checksums
from data.rec.index import read_index
from data.rec.recordio import MAGIC_BYTES, RecordReader
from tests.image_cases import jpeg
from tests.record_files import image_record, write_set


def _verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["verify", str(folder), "--json"])
    return code, json.loads(capsys.readouterr().out)


def _hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, block: int = 1024) -> Path:
    monkeypatch.setattr(checksums, "BLOCK", block)
    folder = write_set(tmp_path, [image_record(key, [key % 4], jpeg(key)) for key in range(9)], classes=4)
    (folder / "lfw.bin").write_bytes(b"pairs")
    assert main(["hash", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("block", [1, 100, 4096, 1 << 26])
def test_hashes_that_agree(
    block: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _hashed(tmp_path, monkeypatch, block=block)
    monkeypatch.setattr("data.checking.verify._AT_ONCE", 3)
    code, found = _verify(folder, capsys)
    assert (code, found["ok"], found["counts"], found["findings"]) == (0, True, {}, [])


def test_every_block_that_was_changed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what a reader of records passes over: padding, bytes behind an image's end, other files."""
    monkeypatch.setattr("data.checking.verify._AT_ONCE", 2)
    folder = _hashed(tmp_path, monkeypatch)
    path = folder / "train.rec"
    content = path.read_bytes()
    for place in (0, 1023, 1024, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        code, found = _verify(folder, capsys)
        assert code == 1
        assert found["counts"]["hash"] == 1
        (finding,) = (finding for finding in found["findings"] if finding["kind"] == "hash")
        begin = place // 1024 * 1024
        assert (finding["file"], finding["offset"]) == ("train.rec", begin)
        assert finding["end"] == min(begin + 1024, len(content))
        assert "changed" in finding["what"]
    path.write_bytes(content)
    (folder / "lfw.bin").write_bytes(b"pears")
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert "hash: lfw.bin, bytes 0 … 5: changed: hashes.json says otherwise" in capsys.readouterr().out
    (folder / "lfw.bin").unlink()
    path.write_bytes(content + MAGIC_BYTES + bytes(4))
    code, found = _verify(folder, capsys)
    told = [(each["file"], each["what"]) for each in found["findings"] if each["kind"] == "hash"]
    assert ("lfw.bin", "missing") in told
    assert ("train.rec", f"expected {len(content)} bytes, found {len(content) + 8}") in told


def test_what_a_damaged_jpeg_hides_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit within the pixels, of a kind that decodes: without hashes nothing is wrong."""
    folder = _hashed(tmp_path, monkeypatch, block=256)
    path, content = folder / "train.rec", (folder / "train.rec").read_bytes()
    reader = RecordReader(path)
    begin, end = read_index(folder / "train.idx", reader).offsets[3:5].tolist()
    for place in range(end - 200, begin, -1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        code, found = _verify(folder, capsys)
        assert code == 1
        if found["counts"] == {"hash": 1}:
            break
    assert found["findings"][0]["offset"] == place // 256 * 256
    (folder / "hashes.json").unlink()
    assert _verify(folder, capsys)[0] == 0


@pytest.mark.parametrize("change", ["text", "sha256", "blocks"])
def test_hashes_that_cannot_be_used_are_a_finding(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _hashed(tmp_path, monkeypatch)
    content = json.loads((folder / "hashes.json").read_text())
    content["files"]["train.rec"][change] = "0" * 64 if change == "sha256" else []
    (folder / "hashes.json").write_text("no" if change == "text" else json.dumps(content))
    code, found = _verify(folder, capsys)
    assert (code, found["counts"]) == (1, {"hash": 1})
    assert found["findings"][0]["file"] == "hashes.json"
    assert ("expected what" if change == "text" else "contradict each other") in found["findings"][0]["what"]


def test_without_images_the_hashes_are_compared_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _hashed(tmp_path, monkeypatch)
    for content in (b"no records at all", b""):
        (folder / "train.rec").write_bytes(content)
        code, found = _verify(folder, capsys)
        assert code == 1
        assert found["counts"]["hash"] == 1 + bool(content)


def test_help_names_the_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "hashes.json" in capsys.readouterr().out
