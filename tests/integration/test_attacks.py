"""What strangers can send: weights, sets, archives, lists, recipes and names made to harm. Each is refused in one line
with the documented exit code, no code runs, nothing is written outside, and time and memory stay bounded.

tests/unit/test_hostile_*.py damage every byte of the formats; test_lst.py, test_pack_tables.py and test_report_page.py
hold paths out of a list, paths in parquet cells and names in the page.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train_dist
from backbones import build_backbone
from clustering.__main__ import main as clustering
from clustering.start import read_start
from configs.schema import ConfigError
from data.__main__ import main as data
from data.decode import DecodeError, decode_image
from data.sources import encode_image
from evaluation.__main__ import main as evaluation
from tests.image_cases import jpeg
from tests.integration.conftest import IDENTITIES, ROOT, Run, call
from tests.record_files import image_record, write_set
from tests.unit.test_report_page import EVIL, Reader

SMALL = "data: {}\nmodel: {backbone: small, embedding_size: 16}\n"
Say = Callable[[], str]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What must not be there in the end."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Say:
    """The one line that was printed to stderr, which starts as an error does."""

    def line() -> str:
        (text,) = capsys.readouterr().err.splitlines()
        assert text.startswith("error: ")
        assert text.isprintable()
        return text

    return line


def _ended(main: Callable[[list[str]], int], *arguments: object) -> int:
    """Exit code of a command line in this process; an error leaves threads and group to the end of its process."""
    threads = torch.get_num_threads()
    try:
        return main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- weights -------------------------------------------------------------------------------------------------------


def _inflating(path: Path) -> None:
    """Weights of some kilobytes that claim 64 MiB."""
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 24)}, whole)
    with zipfile.ZipFile(whole) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))


WEIGHTS: dict[str, Callable[[Path, Path], object]] = {
    "a state that calls": lambda path, canary: torch.save({"stem.weight": Evil(canary)}, path),
    "a bare pickle": lambda path, canary: path.write_bytes(pickle.dumps(Evil(canary))),
    "beside good tensors": lambda path, canary: torch.save(
        {**build_backbone("small", embedding_size=16).state_dict(), "more": Evil(canary)}, path
    ),
    "a whole module": lambda path, canary: torch.save(torch.nn.Linear(2, 2), path),
    "a bomb": lambda path, canary: _inflating(path),
    "no list of weights": lambda path, canary: torch.save([torch.zeros(1)], path),
    "an empty stack": lambda path, canary: path.write_bytes(b"\x80\x02."),
    "cut within a number": lambda path, canary: path.write_bytes(b"\x80\x02K"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_a_stranger(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    run, out = tmp_path / "run", tmp_path / "x.npy"
    run.mkdir()
    (run / "config.yaml").write_text(SMALL)
    WEIGHTS[kind](run / "backbone.pt", canary)
    embed = ("embed", "--records", packed, "--out", out, "--device", "cpu")
    assert _ended(evaluation, *embed, "--run", run) == 2
    told = said()
    assert "backbone.pt: " in told
    assert "weights_only" not in told, "torch's advice to load it all the same"
    alone = ("--weights", run / "backbone.pt", "--backbone", "small", "--embedding-size", 16)
    assert _ended(evaluation, *embed, *alone) == 2
    assert "backbone.pt: " in said()
    assert not out.exists()
    if "calls" in kind:
        assert not canary.exists()
        torch.load(run / "backbone.pt", weights_only=False)
        canary.rmdir()  # the attack is a real one


def test_a_bomb_of_weights_is_not_inflated(packed: Path, tmp_path: Path, said: Say) -> None:
    _inflating(tmp_path / "backbone.pt")
    assert (tmp_path / "backbone.pt").stat().st_size < 1 << 20
    arguments = ("--weights", tmp_path / "backbone.pt", "--backbone", "small", "--out", tmp_path / "x.npy")
    assert _ended(evaluation, "embed", *arguments, "--records", packed) == 2
    assert "it claims 671" in said()


# ---- recipes -------------------------------------------------------------------------------------------------------


def _laughs(levels: str, last: str) -> str:
    """Ten to the power of the levels of texts in a few lines."""
    text, before = "data: {}\nmodel:\n  backbone: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n", "a"
    lists = []
    for name in levels:
        lists.append(f"&{name} [{', '.join([f'*{before}'] * 10)}]")
        before = name
    return text + last.format(", ".join(lists))


RECIPES = {
    "a call": "data: !!python/object/apply:os.mkdir [{canary}]\n",
    "a call in a value": "model: {{backbone: !!python/object/apply:os.mkdir [{canary}]}}\n",
    "a new object": "model: !!python/object/new:os.mkdir [{canary}]\n",
    "a module": "model: !!python/module:os\n",
    "laughs for a list": _laughs("bcdefghijkl", "eval:\n  sets: [{}]\n"),
    "laughs for a choice": _laughs("bcdefghijkl", "optim:\n  name: [{}]\n"),
    "laughs for a name": _laughs("bcdefghijkl", "train:\n  output: [{}]\n"),
    "laughs for the model": "x: &a [a, a, a]\n" + "".join(
        f"y{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
    ) + "model: {backbone: *i}\n",
    "merged merges": "model: &a0 {backbone: small}\n" + "".join(
        f"x{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    ),
    "depth": "model: " + "[" * 3_000,
    "size": "model: {backbone: " + "x" * (1 << 20) + "}\n",
    "base sixty": "model: {embedding_size: " + ":".join(["59"] * 10_000) + "}\n",
    "a key of many signs": "model:\n  " + "k" * 1000 + ": 1\n",
    "a key that steers": 'model: {"a\\e[2J\\nerror: b": 1}\n',
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind.startswith(("a call", "a new", "a module"))])
def test_recipes_that_call(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        RECIPES[kind].replace("{canary}", str(canary)).replace("{{", "{").replace("}}", "}")
    )
    assert _ended(train_dist.main, "--config", run / "config.yaml") == 2
    assert "not valid YAML: could not determine a constructor for the tag" in said()
    assert _ended(evaluation, "embed", "--run", run, "--records", packed, "--out", tmp_path / "x.npy") == 2
    assert "not valid YAML: could not determine a constructor for the tag" in said()


_BOUNDED = """
import resource, sys
from pathlib import Path
from configs.load import load_config, read_section, read_yaml
from configs.schema import ConfigError, ModelConfig
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
def model(path):
    read_section(ModelConfig, "model", read_yaml(path)["model"])
for path in map(Path, sys.argv[1:]):
    for read in (load_config, model):
        try:
            read(path)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 2000, error
            print("refused")
        else:
            print("read")
"""


def test_recipes_that_grow(tmp_path: Path) -> None:
    """A gigabyte and a minute for all of them; each would take hours or all memory."""
    kinds = [kind for kind in RECIPES if not kind.startswith(("a call", "a new", "a module"))]
    paths = [tmp_path / f"{number}.yaml" for number in range(len(kinds))]
    for path, kind in zip(paths, kinds, strict=True):
        path.write_text(RECIPES[kind])
    command = [sys.executable, "-c", _BOUNDED, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    outcomes = done.stdout.split()
    assert len(outcomes) == 2 * len(kinds)
    # Of a run's file only the section `model` is looked at: that of the merged merges is a good one.
    assert [kinds[at // 2] for at, outcome in enumerate(outcomes) if outcome == "read"] == ["merged merges"]


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
from data.decode import DecodeError, check_image, decode_image
from data.sources import encode_image
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


# ---- arrays --------------------------------------------------------------------------------------------------------


def _npy(head: str) -> bytes:
    text = head.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)


ARRAYS: dict[str, Callable[[Path, Path], object]] = {
    "objects": lambda path, canary: np.save(path, np.array([Evil(canary)] * 3, object), allow_pickle=True),
    "objects in rows": lambda path, canary: np.save(path, np.array([[Evil(canary)]] * 3, object), allow_pickle=True),
    "a bare pickle": lambda path, canary: path.write_bytes(pickle.dumps(Evil(canary))),
    "a deep head": lambda path, canary: path.write_bytes(_npy("-" * 9000 + "1")),
    "a huge shape": lambda path, canary: path.write_bytes(
        _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999999999,)}")
    ),
    "a shape of no numbers": lambda path, canary: path.write_bytes(
        _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}")
    ),
    "a head that calls": lambda path, canary: path.write_bytes(
        _npy(f"{{'descr': __import__('os').mkdir({str(canary)!r}), 'fortran_order': False, 'shape': (3,)}}")
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_a_stranger(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    bad, good = tmp_path / "bad.npy", tmp_path / "good.npy"
    ARRAYS[kind](bad, canary)
    np.save(good, np.eye(3, dtype=np.float32))
    out = ("--out", tmp_path / "out")
    for command in (
        ("report", bad, "--records", packed, *out),
        ("report", good, "--labels", bad, *out),
        ("kmeans", bad, "--k", 2, "--out", tmp_path / "centres.npy"),
    ):
        assert _ended(clustering, *command) == 2, command
        assert "bad.npy: " in said()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"bad\.npy: ") as refused:
        read_start(str(bad), num_samples=3, num_clusters=3)
    assert "\n" not in str(refused.value)


# ---- names in the report -------------------------------------------------------------------------------------------


def test_names_in_a_report_are_text(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>\"'&"
    shutil.copytree(packed, folder)
    (folder / "identities.txt").write_text(f"{EVIL}\n" * IDENTITIES)
    rows = np.random.default_rng(0).normal(size=(IDENTITIES * 8, 16)).astype(np.float32)
    embeddings = tmp_path / "<script>alert(2)"
    embeddings.mkdir()
    np.save(embeddings / "x.npy", rows)
    out = tmp_path / "<script>alert(3)"
    assert _ended(clustering, "report", embeddings, "--records", folder, "--out", out) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert "script" not in {tag for tag, _ in read.elements}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert all((a["src"] or "").startswith("data:image/jpeg") for tag, a in read.elements if tag == "img")
    assert page.count("&lt;script&gt;alert(1)") >= 20
    assert "&lt;script&gt;alert(2)" in page
    assert "&lt;script&gt;alert(3)" in page


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_credentials_reach_no_file_and_no_message(
    train_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address in ("s3://AKIA:hunter2@bucket/set", "https://host/set?token=hunter2"):
        done = train_here(f"data.path={address}")
        assert done.returncode == 2
        assert "data.path: expected an address without credentials" in done.stderr
        assert data(["inspect", address]) == 2
        printed = capsys.readouterr()
        assert "the address: expected an address without credentials" in printed.err
        assert "hunter2" not in done.stdout + done.stderr + printed.out + printed.err
    assert not (tmp_path / "run").exists()
