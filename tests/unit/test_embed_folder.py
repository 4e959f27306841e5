"""Embeddings of folders, records and verification sets: rows, what says which image they are of, what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from clustering.__main__ import main as clustering
from clustering.service.parts import PartFiles
from data.__main__ import main as data
from data.errors import DataError
from data.loading.decode import decode_image
from data.verification_bin import write_bin
from evaluation.__main__ import main
from evaluation.embed import records as embed_records
from evaluation.embed.sources import FolderImages
from tests.image_cases import damaged_images, jpeg, odd_images, photograph, saved

Call = Callable[..., int]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pt"
    torch.save(build_backbone("small", embedding_size=16).state_dict(), path)
    return path


@pytest.fixture
def embed(weights: Path) -> Iterator[Call]:
    """`embed("--images", …)`: the exit code."""
    threads = torch.get_num_threads()

    def call(*arguments: object, name: Path = weights) -> int:
        model = ("--weights", name, "--backbone", "small", "--embedding-size", 16, "--device", "cpu")
        try:
            return main(["embed", *map(str, (*model, *arguments))])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Seven images of three identities, whose order by name is not that of their making, and files of others."""
    folder = tmp_path / "faces"
    names = ("b/2.jpg", "b/10.jpg", "<i>a&/x.JPEG", "b/.hidden.jpg", "c/é.png", "c/1.jpg", "b/z.jpg")
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number) if "png" not in name else saved(photograph(seed=4), "PNG"))
    (folder / "c" / "notes.txt").write_text("no image")
    (folder / "list.csv").write_text("no image")
    (folder / ".thumbnails").mkdir()
    return folder


NAMES = ["<i>a&/x.JPEG", "b/10.jpg", "b/2.jpg", "b/z.jpg", "c/1.jpg", "c/é.png"]


def _plainly(image: bytes, weights: Path) -> npt.NDArray[np.float64]:
    """Sum of the embeddings of an image and its mirror image, in float64."""
    backbone = build_backbone("small", embedding_size=16)
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    pixels = torch.from_numpy(decode_image(image, (112, 112)).astype(np.float64)).permute(2, 0, 1)[None]
    x_13HW = (pixels - 127.5) / 127.5
    with torch.no_grad():
        sum_1D = backbone.double().eval()(x_13HW) + backbone(x_13HW.flip(-1))
    return np.asarray(sum_1D.numpy()[0])


def test_rows_are_those_of_the_files_that_are_listed(embed: Call, faces: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x.npy"
    assert embed("--images", faces, "--out", out, "--dtype", "float32", "--batch-size", 4) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.labels.npy", "x.names.txt", "x.npy"]
    assert (out.parent / "x.names.txt").read_text(encoding="utf-8").splitlines() == NAMES
    labels = np.load(out.parent / "x.labels.npy")
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 1, 1, 1, 2, 2])
    x_ND = np.load(out)
    for row, name in zip(x_ND, NAMES, strict=True):
        plain = _plainly((faces / name).read_bytes(), weights)
        assert row == pytest.approx(plain / np.linalg.norm(plain), abs=1e-5)


def test_raw_rows_have_the_length_of_the_networks_own(embed: Call, faces: Path, weights: Path, tmp_path: Path) -> None:
    assert embed("--images", faces, "--out", tmp_path / "x.npy", "--dtype", "float32", "--raw") == 0
    for row, name in zip(np.load(tmp_path / "x.npy"), NAMES, strict=True):
        plain = _plainly((faces / name).read_bytes(), weights)
        assert np.linalg.norm(plain) != pytest.approx(1, abs=0.05)
        assert row == pytest.approx(plain, abs=1e-5 * np.abs(plain).max() + 1e-5)


def test_a_folder_gives_what_its_packed_set_does(embed: Call, faces: Path, tmp_path: Path) -> None:
    """Images of other sizes and kinds too."""
    for name, image in (odd_images() | {"large": saved(photograph(300, 200), "PNG")}).items():
        (faces / "b" / f"{name}.jpg").write_bytes(image)
    assert data(["pack", "folder", str(faces), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    assert embed("--images", faces, "--out", tmp_path / "a.npy") == 0
    assert embed("--records", tmp_path / "set", "--out", tmp_path / "b.npy") == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("b.*")) == ["b.npy"]


def test_a_folder_without_subfolders_and_a_verification_set(embed: Call, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    images = [jpeg(number) for number in range(20)]
    for number, image in enumerate(images):
        (flat / f"{number:02}.jpg").write_bytes(image)
    write_bin(tmp_path / "s.bin", images, [True, False] * 5)
    assert embed("--images", flat, "--out", tmp_path / "x.npy") == 0
    assert embed("--bin", tmp_path / "s.bin", "--out", tmp_path / "y.npy") == 0
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()
    assert (tmp_path / "x.names.txt").read_text().split() == [f"{number:02}.jpg" for number in range(20)]
    assert not list(tmp_path.glob("*labels*")) + list(tmp_path.glob("y.*.txt"))


def test_bad_images_are_rows_of_zeros_and_named(
    embed: Call, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed("--images", faces, "--out", tmp_path / "good.npy") == 0
    assert "decode" not in capsys.readouterr().out
    damaged = [content for content, _ in damaged_images().values()]
    for number, content in enumerate(damaged[:12]):
        (faces / "bad").mkdir(exist_ok=True)
        (faces / "bad" / f"{number:02}\x1b[2J.jpg").write_bytes(content)
    assert embed("--images", faces, "--out", tmp_path / "x.npy", "--batch-size", 5) == 0
    out = capsys.readouterr().out
    found = FolderImages(faces)
    bad = [row for row in range(len(found)) if found.name(row).startswith("bad/")]
    assert len(bad) == 12
    # One is of another size, which the packer's rule makes good.
    x_ND = np.load(tmp_path / "x.npy")
    zeros = np.flatnonzero(~x_ND.any(axis=1)).tolist()
    assert set(zeros) <= set(bad)
    assert len(zeros) == 11
    assert f"{len(zeros)} images do not decode: their rows are zero, the first 10 of them:\n" in out
    assert [int(line.split()[1][:-1]) for line in out.splitlines() if line.startswith("  row ")] == zeros[:10]
    assert all(line.isprintable() for line in out.splitlines())
    assert "00\\x1b[2J.jpg: " in out
    np.testing.assert_array_equal(np.delete(x_ND, bad, axis=0), np.load(tmp_path / "good.npy"))


def test_embeddings_that_float16_cannot_hold_are_counted(
    embed: Call, faces: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = build_backbone("small", embedding_size=16)
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    state = backbone.state_dict()
    last = [name for name, value in state.items() if value.is_floating_point() and value.dim()][-1]
    for name in state:
        if name.rsplit(".", 1)[0] == last.rsplit(".", 1)[0] and name.endswith(("weight", "bias")):
            state[name] = state[name] * 1e6
    torch.save(state, tmp_path / "huge.pt")
    huge = tmp_path / "huge.pt"
    assert embed("--images", faces, "--out", tmp_path / "x.npy", "--raw", name=huge) == 0
    assert "6 embeddings were not finite: their rows are zero" in capsys.readouterr().out
    assert not np.load(tmp_path / "x.npy").any()
    assert embed("--images", faces, "--out", tmp_path / "y.npy", name=huge) == 0
    assert np.linalg.norm(np.load(tmp_path / "y.npy").astype(float), axis=1) == pytest.approx(1, abs=1e-3)


def test_a_folder_of_parts_is_what_kmeans_reads(
    embed: Call, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed("--images", faces, "--out", tmp_path / "x.npy") == 0
    assert embed("--images", faces, "--out", f"{tmp_path / 'parts'}/") == 0
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-00000-of-00001.npy"]
    np.testing.assert_array_equal(PartFiles(tmp_path / "parts").read(0, 99), np.load(tmp_path / "x.npy"))
    for name in ("names.txt", "labels.npy"):
        assert (tmp_path / f"parts.{name}").read_bytes() == (tmp_path / f"x.{name}").read_bytes()
    labels = ("--labels", tmp_path / "parts.labels.npy")
    kmeans = ("kmeans", tmp_path / "parts", "--out", tmp_path / "centres.npy", *labels, "--device", "cpu")
    assert clustering([*map(str, kmeans)]) == 0
    assert "3 centres of 16 components" in capsys.readouterr().out


def test_what_is_there_is_replaced_only_when_asked_for(
    embed: Call, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "x.npy", tmp_path / "parts"):
        command = ("--images", faces, "--out", out)
        assert embed(*command) == 0
        before = out.stat().st_mtime_ns
        assert embed(*command) == 2
        assert f"{out.name}: expected no " in capsys.readouterr().err
        assert out.stat().st_mtime_ns == before
        assert embed(*command, "--force") == 0
        assert out.stat().st_mtime_ns > before
    # Names of other rows must not stay beside embeddings of records.
    write_bin(tmp_path / "s.bin", [jpeg(0)] * 20, [True, False] * 5)
    assert embed("--bin", tmp_path / "s.bin", "--out", tmp_path / "parts", "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("parts", ".parts"))) == ["parts"]
    (tmp_path / "parts" / "mine.npy").write_bytes(b"")
    assert embed(*command, "--force") == 2
    assert "expected embeddings to replace, found mine.npy" in capsys.readouterr().err
    (tmp_path / "y.labels.npy").write_bytes(b"")
    assert embed("--images", faces, "--out", tmp_path / "y.npy") == 2
    assert "y.labels.npy: expected no file there" in capsys.readouterr().err
    (tmp_path / "z.npy").mkdir()
    assert embed("--images", faces, "--out", tmp_path / "z.npy", "--force") == 2
    assert "expected embeddings to replace, found a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.npy", "parts"])
def test_nothing_is_left_of_what_fails(
    embed: Call,
    faces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    command = ("--images", faces, "--out", tmp_path / "out" / name, "--batch-size", 2)
    assert embed(*command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    calls: list[int] = []
    plain = embed_records._embed

    def full(*args: object) -> object:
        calls.append(0)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_records, "_embed", full)
    assert embed(*command, "--force") == 2
    assert "cannot write it (No space left on device)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_place_that_cannot_be_written(
    embed: Call, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file" / "x.npy", tmp_path / "file" / "parts"):
        assert embed("--images", faces, "--out", out) == 2
        assert "cannot write it" in capsys.readouterr().err
    assert embed("--images", faces, "--out", "..") == 2
    assert "--out ..: expected a name" in capsys.readouterr().err


def _many(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "0.jpg").write_bytes(jpeg(0))


def _loose(folder: Path) -> None:
    _many(folder)
    (folder / "1.png").write_bytes(jpeg(0))


def _empty_identity(folder: Path) -> None:
    _many(folder)
    (folder / "b").mkdir()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: None, "expected JPEG or PNG files, or subfolders of them, found none"),
        (_loose, "found both: move 1.png into one"),
        (_empty_identity, "no JPEG or PNG file in it"),
        (lambda folder: (folder / "a\nb.jpg").write_bytes(jpeg(0)), "expected a name in UTF-8 without a line break"),
        (
            lambda folder: (folder / os.fsdecode(b"\xff.jpg")).write_bytes(jpeg(0)),
            "expected a name in UTF-8 without a line break",
        ),
        (lambda folder: folder.rmdir(), "cannot read it"),
        (lambda folder: (folder.rmdir(), folder.write_bytes(b"")), "cannot read it"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, make: Callable[[Path], object], match: str) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match=match) as raised:
        FolderImages(folder)
    assert str(raised.value).isprintable()


def test_one_source_is_expected(embed: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sources in ((), ("--images", "a", "--records", "b")):
        with pytest.raises(SystemExit) as ended:
            embed(*sources, "--out", tmp_path / "x.npy")
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
