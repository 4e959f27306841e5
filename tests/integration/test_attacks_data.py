"""What strangers can send as data: sets, images and archives made to harm; as in test_attacks.py."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from data.__main__ import main as data
from data.loading.decode import DecodeError, decode_image
from data.making.sources import encode_image
from tests.attack_cases import Evil, Say
from tests.image_cases import jpeg
from tests.integration.conftest import Run, call
from tests.record_files import image_record, write_set

SMALL = "data: {}\nmodel: {backbone: small, embedding_size: 16}\n"


# ---- sets ----------------------------------------------------------------------------------------------------------


def test_pickles_beside_the_records_are_left_alone_by_training(
    train_here: Run, packed: Path, tmp_path: Path, canary: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(packed, folder)
    content = pickle.dumps(Evil(canary))
    for name in ("train.meta", "train.lst", "other.bin", "other.pkl"):
        (folder / name).write_bytes(content)
    assert train_here("train.stop_after_steps=1", "clustering.enabled=false", data=folder).returncode == 0
    assert not canary.exists()
    pickle.loads(content)
    canary.rmdir()  # the attack is a real one


def test_a_verification_set_that_calls(train_here: Run, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(([Evil(canary)] * 20, [True] * 10)))
    done = train_here(f"eval.sets=[{path}]")
    assert done.returncode == 2
    assert "lfw.bin: expected a pickle of encoded images and booleans: it names posix.mkdir" in done.stderr
    assert data(["inspect", str(path)]) == 2


def test_a_property_that_states_a_huge_size(tmp_path: Path, said: Say, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_set(tmp_path / "set", [image_record(key, [key % 2], jpeg(key)) for key in range(4)], classes=2)
    (folder / "property").write_text("2,60000,60000\n")
    expected = "property: expected images of at most 4096 pixels a side, found 60000 x 60000"
    assert data(["inspect", str(folder), "--sheet", str(tmp_path / "sheet.png")]) == 2
    assert expected in said()
    assert data(["verify", str(folder)]) == 1
    assert expected in capsys.readouterr().out


# ---- images --------------------------------------------------------------------------------------------------------


def _png(width: int, height: int, rows: int) -> bytes:
    """A PNG of that size, the first rows of it black and no others there: some kilobytes for any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _jpeg(width: int, height: int) -> bytes:
    """A JPEG that states that size."""
    content = bytearray(jpeg(0))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


BOMBS = {
    "png": lambda: _png(9000, 9000, 9000),  # whole: PIL by itself only warns of it
    "png of a head": lambda: _png(2**31 - 1, 2**31 - 1, 0),
    "jpeg": lambda: _jpeg(65_500, 65_500),
    "jpeg that PIL would take": lambda: _jpeg(13_000, 13_000),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("source", ["folder", "webdataset", "lst", "parquet"])
def test_bombs_are_not_packed(source: str, kind: str, tmp_path: Path, said: Say) -> None:
    bomb = BOMBS[kind]()
    assert len(bomb) < 1 << 19
    suffix = kind[:4].strip()
    out = ("--out", tmp_path / "set", "--workers", 1)
    if source in ("folder", "lst"):
        (tmp_path / "images" / "a").mkdir(parents=True)
        (tmp_path / "images" / "a" / f"b.{suffix}").write_bytes(bomb)
        (tmp_path / "a.lst").write_text(f"1\ta/b.{suffix}\t0\n")
        place = [tmp_path / "images"] if source == "folder" else [tmp_path / "a.lst", "--root", tmp_path / "images"]
    elif source == "webdataset":
        _tar(tmp_path / "shards" / "0.tar", [(f"a.{suffix}", bomb), ("a.cls", b"0")])
        place = [tmp_path / "shards"]
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"image": [bomb], "label": [0]}), tmp_path / "a.parquet")
        place = [tmp_path / "a.parquet", "--image-column", "image", "--label-column", "label"]
    columns = ("--columns", "face2rec") if source == "lst" else ()
    assert data(["pack", source, *(str(word) for word in (*place, *columns, *out))]) == 2
    text = said()
    assert "expected at most 67108864 pixels" in text or "could be decompression bomb" in text
    assert not (tmp_path / "set" / "train.rec").exists()


_PEAK = """
import resource, sys
from pathlib import Path
from data.loading.decode import DecodeError, check_image, decode_image
from data.making.sources import encode_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read, more in ((encode_image, ()), (decode_image, ((112, 112),)), (check_image, ((112, 112),))):
        try:
            read(Path(path).read_bytes(), *more)
        except ValueError:
            continue
        sys.exit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(len(BOMBS))]
    for path, bomb in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(bomb())
    done = call("-c", _PEAK, *map(str, paths))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000, "kB, where 240 MB are one of them decoded"


def test_the_largest_image_is_packed() -> None:
    assert len(encode_image(_png(8192, 1, 1))) > 100
    with pytest.raises(ValueError, match="expected at most 67108864 pixels, found 8192 x 8193"):
        encode_image(_png(8192, 8193, 0))


@pytest.mark.parametrize("kind", ["png of a head", "jpeg"])
def test_bombs_in_records_and_verification_sets(
    kind: str, train_here: Run, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = BOMBS[kind]()
    with pytest.raises(DecodeError, match="expected 112 x 112 pixels"):
        decode_image(bomb, (112, 112))
    images = [jpeg(key) for key in range(47)] + [bomb]
    folder = write_set(tmp_path / "set", [image_record(k, [k % 2], image) for k, image in enumerate(images)], classes=2)
    assert data(["verify", str(folder)]) == 1
    assert "expected 112 x 112 pixels" in capsys.readouterr().out
    settings = ("train.epochs=1", "clustering.enabled=false", "data.max_bad_images=0")
    done = train_here(*settings, data=folder)
    assert done.returncode == 2
    assert "1 images did not decode" in done.stderr
    path = tmp_path / "pairs.bin"
    path.write_bytes(pickle.dumps(([*[jpeg(0)] * 39, bomb], [True, False] * 10)))
    done = train_here(f"eval.sets=[{path}]", name="other")
    assert done.returncode == 2
    assert "pairs: image 39 of 40: expected 112 x 112 pixels" in done.stderr


# ---- archives ------------------------------------------------------------------------------------------------------


def _tar(path: Path, members: list[tuple[str, bytes | str]]) -> None:
    """Members by name: bytes are a file's, text is what a symbolic link (`>…`) or a hard link (`=…`) leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.SYMTYPE if content[0] == ">" else tarfile.LNKTYPE
                member.linkname = content[1:]
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _shards(tmp_path: Path, *members: tuple[str, bytes | str]) -> list[str]:
    _tar(tmp_path / "shards" / "000000.tar", list(members))
    return ["pack", "webdataset", str(tmp_path / "shards"), "--out", str(tmp_path / "set"), "--workers", "1"]


def test_names_that_lead_out_of_a_tar_are_only_names(tmp_path: Path, canary: Path) -> None:
    members = [
        (f"{where}{number}.{suffix}", content)
        for number, where in enumerate(("../", "../../", f"{canary}/", "/", "./a/../../"))
        for suffix, content in (("jpg", jpeg(number)), ("cls", str(number).encode()))
    ]
    command = _shards(tmp_path, *members)
    before = {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path)}
    assert data(command) == 0
    assert before == {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "shards"]
    assert not Path("/0.jpg").exists()


@pytest.mark.parametrize("link", [">", "="])
def test_links_in_a_tar_are_not_followed(link: str, tmp_path: Path, said: Say) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(7))
    assert data(_shards(tmp_path, ("a.jpg", f"{link}{secret}"), ("a.cls", b"0"))) == 2
    assert "a lacks an image" in said()
    assert not (tmp_path / "set" / "train.rec").exists()


def test_names_that_would_steer_a_terminal_or_a_log(tmp_path: Path, said: Say) -> None:
    name = "a\x1b[2J\nerror: all is well"
    for members in ([(f"{name}.jpg", jpeg(0))], [(f"{name}.cls", b"x")], [(f"{'n' * 5000}.jpg", jpeg(0))]):
        assert data(_shards(tmp_path, *members)) == 2
        assert len(said()) < 1500
    folder = tmp_path / "photos" / "per\x1b[2J\u202eson"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"none")
    assert data(["pack", "folder", str(tmp_path / "photos"), "--out", str(tmp_path / "set"), "--workers", "1"]) == 2
    assert "per\\x1b[2J\\u202eson" in said()
