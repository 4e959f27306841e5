"""Lists, tar and parquet files that change while they are packed: never images under labels of others."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.__main__ import main
from data.making import pack
from data.making.pack import SetWriter
from data.rec.records import RecordSet
from tests.image_cases import jpeg

COUNT = 12
Sources = dict[str, tuple[Path, list[str]]]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A file of each kind and what else its command takes; image n has label n // 4."""
    (tmp_path / "photos").mkdir()
    lines = []
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(COUNT):
            (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(jpeg(number))
            lines.append(f"{number}\t{number // 4}\t{number:02d}.jpg\n")
            for name, content in (("jpg", jpeg(number)), ("cls", b"%d" % (number // 4))):
                member = tarfile.TarInfo(f"{number:02d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.lst").write_text("".join(lines))
    images = pa.array([jpeg(number) for number in range(COUNT)], pa.binary())
    pq.write_table(pa.table({"image": images, "label": [n // 4 for n in range(COUNT)]}), tmp_path / "a.parquet", 3)
    mixed = pa.table({"image": images, "label": [n % 4 for n in range(COUNT)]})
    pq.write_table(mixed, tmp_path / "mixed.parquet", 12)
    return {
        "lst": (tmp_path / "a.lst", ["--root", str(tmp_path / "photos")]),
        "webdataset": (tmp_path / "a.tar", []),
        "parquet": (tmp_path / "a.parquet", []),
        "set aside": (tmp_path / "mixed.parquet", []),
    }


def _change(path: Path) -> None:
    """The same size, another time, and of a list another content."""
    if path.suffix == ".lst":
        path.write_bytes(path.read_bytes().replace(b"03.jpg", b"11.jpg"))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize(("done", "found"), [(_change, "changed"), (Path.unlink, "removed")])
@pytest.mark.parametrize("kind", ["lst", "webdataset", "parquet", "set aside"])
def test_a_change_meanwhile_ends_it(
    tmp_path: Path,
    sources: Sources,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    done: Callable[[Path], None],
    found: str,
    chunk: int,
) -> None:
    """Seen at the next chunk, or before the set appears when there is none."""
    path, more = sources[kind]
    written = []
    usual = SetWriter.write

    def write(writer: SetWriter, label: int, image: bytes) -> None:
        usual(writer, label, image)
        written.append(label)
        if len(written) == 2:
            done(path)

    monkeypatch.setattr(pack, "_CHUNK", chunk)
    monkeypatch.setattr(SetWriter, "write", write)
    command = ["pack", kind if kind != "set aside" else "parquet", str(path), *more, "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "set")]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"{path}: expected the file that was there at the start, but it was {found} while it was packed" in line
    assert len(written) == (2 if chunk == 2 and kind != "set aside" else COUNT)
    assert not (tmp_path / "set" / "train.rec").exists()
    if found == "changed":
        monkeypatch.setattr(SetWriter, "write", usual)
        assert main([*command, "--out", str(tmp_path / "set")]) == 0
        assert main([*command, "--out", str(tmp_path / "fresh")]) == 0
        for name in os.listdir(tmp_path / "fresh"):
            assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
        assert RecordSet.open(tmp_path / "set").num_samples == COUNT
