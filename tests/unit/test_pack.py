"""`python -m data`: packed sets are what was asked for, whole or not there; what is wrong is said in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.__main__ import main
from data.loading.decode import decode_image
from data.rec.header import unpack
from data.rec.index import read_index
from data.rec.recordio import RecordReader
from data.rec.records import RecordSet
from data.synthetic import SyntheticFaces, plan_samples
from data.verification_bin import read_bin
from tests.image_cases import damaged_images, photograph, saved

SMALL = (
    "--identities",
    "6",
    "--images-per-identity",
    "4",
    "--verification-identities",
    "3",
    "--pairs",
    "10",
    "--seed",
    "5",
)


def _synthetic(out: Path, *arguments: str, workers: int = 1) -> int:
    return main(["pack", "synthetic", "--out", str(out), "--workers", str(workers), *SMALL, *arguments])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Four identities, 4 images each, all 112x112 JPEG."""
    for number, name in enumerate(["zoe", "ann", "bob é", "carl"]):
        (tmp_path / "people" / name).mkdir(parents=True)
        for image in range(4):
            content = saved(photograph(seed=10 * number + image), "JPEG", quality=80)
            (tmp_path / "people" / name / f"{image}.jpg").write_bytes(content)
    return tmp_path / "people"


def test_synthetic_set_in_the_layout_of_insightface(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert _synthetic(out, "--label-noise", "0.25") == 0
    assert sorted(_files(out)) == ["property", "train.idx", "train.rec", "verification.bin"]
    assert (out / "property").read_text() == "6,112,112\n"
    plan = plan_samples(identities=6, images_per_identity=4, long_tail=0.0, label_noise=0.25, seed=5)
    plan = plan[np.argsort(plan[:, 2], kind="stable")]
    faces = SyntheticFaces(identities=6, seed=5)
    records = RecordSet.open(out)
    assert records.layout == "insightface"
    assert records.labels.tolist() == plan[:, 2].tolist()
    for sample, (identity, image, label) in enumerate(plan.tolist()):
        assert records.image(sample) == (label, faces.jpeg(identity, image))

    keys = [int(line.split("\t")[0]) for line in (out / "train.idx").read_text().splitlines()]
    assert keys == [*range(1, 31), 0], "images, then identity headers, key 0 last"
    reader = RecordReader(out / "train.rec")
    index = read_index(out / "train.idx", reader)
    headers = [unpack(reader.read_at(offset)) for offset in index.offsets[24:].tolist()]
    ends = 1 + np.cumsum(np.bincount(plan[:, 2], minlength=6))
    assert [header.labels for header, _ in headers] == [*zip([1, *ends[:-1]], ends, strict=True), (25, 31)]
    assert {(header.flag, len(image)) for header, image in headers} == {(2, 0)}


def test_verification_pairs_are_of_other_identities(tmp_path: Path) -> None:
    assert _synthetic(tmp_path) == 0
    images, same = read_bin(tmp_path / "verification.bin")
    assert (len(images), same.tolist()) == (20, [True, False] * 5)
    faces = SyntheticFaces(identities=3, seed=5, first_identity=6)
    known = {faces.jpeg(identity, image): identity for identity in range(3) for image in range(4)}
    persons = [known[image] for image in images]
    assert [first == second for first, second in zip(persons[::2], persons[1::2], strict=True)] == same.tolist()
    records = RecordSet.open(tmp_path)
    assert not set(images) & {bytes(records.image(sample)[1]) for sample in range(records.num_samples)}
    with (tmp_path / "verification.bin").open("rb") as file:
        assert pickle.load(file) == (images, same.tolist())


def test_workers_change_nothing(tmp_path: Path) -> None:
    many = ("--identities", "20", "--images-per-identity", "8")
    assert _synthetic(tmp_path / "one", *many) == 0
    assert _synthetic(tmp_path / "two", *many, workers=2) == 0
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_a_set_is_replaced_only_by_force(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert main(["pack", "folder", str(people), "--out", str(out), "--workers", "1"]) == 0
    before = _files(out)
    capsys.readouterr()
    assert _synthetic(out) == 2
    assert "--force" in _error(capsys)
    assert _files(out) == before
    assert _synthetic(out, "--force") == 0
    assert sorted(_files(out)) == ["property", "train.idx", "train.rec", "verification.bin"]


def test_folder(tmp_path: Path, people: Path) -> None:
    (people / "ann" / "notes.txt").write_text("not an image")
    (people / ".cache").mkdir()
    (people / "list.txt").write_text("not a folder")
    out = tmp_path / "out" / "set"
    assert main(["pack", "folder", str(people), "--out", str(out), "--workers", "2"]) == 0
    assert (out / "identities.txt").read_text(encoding="utf-8").splitlines() == ["ann", "bob é", "carl", "zoe"]
    records = RecordSet.open(out)
    assert (records.num_samples, records.num_classes, records.layout) == (16, 4, "insightface")
    expected = [path.read_bytes() for path in sorted(people.rglob("*.jpg"))]
    assert [bytes(records.image(sample)[1]) for sample in range(16)] == expected, "byte for byte"
    assert records.labels.tolist() == np.repeat(range(4), 4).tolist()


def test_folder_with_identities_held_out(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", "folder", str(people), "--out", str(tmp_path / "set"), "--workers", "1", "--pairs", "10"]
    assert main([*command, "--verification-identities", "2"]) == 0
    names = (tmp_path / "set" / "identities.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == 2
    owner = {path.read_bytes(): path.parent.name for path in people.rglob("*.jpg")}
    records = RecordSet.open(tmp_path / "set")
    assert [owner[bytes(records.image(n)[1])] for n in range(8)] == [names[0]] * 4 + [names[1]] * 4
    images, same = read_bin(tmp_path / "set" / "verification.bin")
    persons = [owner[image] for image in images]
    assert not set(persons) & set(names)
    assert [first == second for first, second in zip(persons[::2], persons[1::2], strict=True)] == same.tolist()
    capsys.readouterr()
    assert main([*command, "--verification-identities", "4", "--force"]) == 2
    assert "expected fewer than the 4" in _error(capsys)


def test_bin_of_a_folder(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bin", str(people), "--out", str(tmp_path / "people.bin"), "--pairs", "10", "--workers", "1"]
    assert main(command) == 0
    images, same = read_bin(tmp_path / "people.bin")
    assert (len(images), same.sum()) == (20, 5)
    capsys.readouterr()
    assert main(command) == 2
    assert "--force" in _error(capsys)
    assert main([*command, "--force", "--pairs", "1000"]) == 2
    assert "expected 500 different pairs of one person, found 24" in _error(capsys)
    assert read_bin(tmp_path / "people.bin").images == images


def test_images_that_do_not_decode(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    good = (people / "bob é" / "1.jpg").read_bytes()
    command = ["pack", "folder", str(people), "--out", str(out), "--workers", "1"]
    for content in (b"", b"text", good[: len(good) // 2], saved(photograph(), "GIF")):
        (people / "bob é" / "1.jpg").write_bytes(content)
        assert main(command) == 2
        assert "bob é/1.jpg: expected a JPEG or PNG image" in _error(capsys)
        assert not out.exists(), "a broken run leaves nothing"
    assert main([*command, "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert "left out: " in printed.err
    assert "1 left out" in printed.out
    assert RecordSet.open(out).labels.tolist() == np.repeat(range(4), [4, 3, 4, 4]).tolist()


@pytest.mark.parametrize("name", ["half, then an end", "ends within the data", "garbage within the data"])
def test_what_training_refuses_is_not_packed(
    tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """PIL opens these; the strict decoder of the training does not."""
    content, reason = damaged_images()[name]
    (people / "ann" / "2.jpg").write_bytes(content)
    command = ["pack", "folder", str(people), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert main(command) == 2
    error = _error(capsys)
    assert "ann/2.jpg: expected a JPEG or PNG image" in error
    assert reason in error
    assert main([*command, "--skip-bad"]) == 0
    assert "1 left out" in capsys.readouterr().out
    records = RecordSet.open(tmp_path / "set")
    for sample in range(records.num_samples):
        decode_image(records.image(sample)[1], records.image_size)
    assert records.num_samples == 15


@pytest.mark.parametrize("name", [b"\xff/0.jpg", b"ann/\xff.jpg"])
def test_names_that_are_not_utf8(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str], name: bytes) -> None:
    path = people / os.fsdecode(name)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((people / "ann" / "0.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    for command in (["pack", "folder", str(people), "--out"], ["bin", str(people), "--pairs", "10", "--out"]):
        assert main([*command, str(tmp_path / "out"), "--workers", "1", "--force"]) == 2
        assert "expected names in UTF-8, found '\\udcff" in _error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "folder", "{}/none", "--out", "{}/set"], "none: cannot read it (No such file or directory)"),
        (["pack", "folder", "{}/file", "--out", "{}/set"], "file: cannot read it (Not a directory)"),
        (["pack", "folder", "{}/empty", "--out", "{}/set"], "expected a subfolder of images for each identity"),
        (["pack", "folder", "{}", "--out", "{}/set"], "empty: no JPEG or PNG file in it"),
        (
            ["pack", "synthetic", "--out", "{}/file"],
            "file: expected a folder, or nothing yet, found a file: name another",
        ),
        (["pack", "synthetic", "--out", "{}/file/set"], "cannot write it (Not a directory)"),
        (["pack", "synthetic", "--out", "{}/set", "--verification-identities", "1"], "pairs of one person, found 190"),
        (["index", "{}/none.rec"], "none.rec: cannot read it (No such file or directory)"),
        (["index", "{}/file"], "expected records, found an empty file"),
        (["inspect", "{}/none"], "train.rec: missing"),
        (["bin", "{}/none", "--out", "{}/a.bin"], "none: cannot read it"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    command = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    assert main([*command, *(["--workers", "1"] if command[0] in ("pack", "bin") else [])]) == 2
    assert message in _error(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pack"],
        ["pack", "synthetic"],
        ["pack", "synthetic", "--out", "x", "--identities", "1"],
        ["pack", "synthetic", "--out", "x", "--label-noise", "1.5"],
        ["pack", "synthetic", "--out", "x", "--long-tail", "many"],
        ["pack", "synthetic", "--out", "x", "--workers", "0"],
        ["pack", "synthetic", "--out", "x", "--identities", "2", "--pairs", "9"],
        ["pack", "folder", "none", "--out", "x", "--pairs", "9"],
        ["bin", "none", "--out", "x", "--pairs", "9"],
        ["index"],
        ["unpack"],
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "--help" in _error(capsys)


def test_index_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _synthetic(tmp_path) == 0
    before = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").unlink()
    assert main(["inspect", str(tmp_path)]) == 0, "a set is read without an index too"
    capsys.readouterr()
    assert main(["index", str(tmp_path / "train.rec")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/train.idx: 24 images, 6 identity headers\n"
    assert (tmp_path / "train.idx").read_bytes() == before
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for line in ("layout: insightface", "images: 24", "identities: 6", "formats of 24 images: 24 JPEG"):
        assert line in shown.splitlines()
    os.truncate(tmp_path / "train.rec", (tmp_path / "train.rec").stat().st_size - 20)
    assert main(["index", str(tmp_path / "train.rec")]) == 2
    assert "--images-only" in _error(capsys)
    assert main(["index", "--images-only", str(tmp_path / "train.rec")]) == 0
    assert "24 images, 0 identity headers; the record file is cut at byte" in capsys.readouterr().out
    assert RecordSet.open(tmp_path).layout == "sequential"
