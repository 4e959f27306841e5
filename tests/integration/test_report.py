"""From records to embeddings, to a report, to a cleaned set: by the command lines, with all that can be wrong."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from clustering.commands import clean, report
from clustering.commands.arguments import Parser
from clustering.report.findings import Copy, Duplicate, Noise, Split
from clustering.report.findings_csv import FILES, table_text
from data.loading.decode import decode_image
from data.making.pack import write_records
from data.rec.properties import Properties
from data.rec.records import RecordSet
from evaluation.__main__ import main as evaluation
from tests.findings_cases import persons
from tests.integration.conftest import IDENTITIES, IMAGES

N = IDENTITIES * IMAGES
Call = Callable[..., int]


@pytest.fixture
def command() -> Iterator[Call]:
    """`command("report", …)`: the exit code of `python -m clustering report …`, in this process."""
    parser = Parser(prog="python -m clustering")
    subparsers = parser.add_subparsers(required=True, parser_class=Parser)
    for module in (report, clean):
        module.add(subparsers)

    def call(*arguments: object) -> int:
        args = parser.parse_args([str(argument) for argument in arguments])
        try:
            code: int = args.run(args)
            return code
        finally:
            _close()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()  # after an error the command line leaves that to the end of its process


def embed(*arguments: object) -> int:
    threads = torch.get_num_threads()
    try:
        return evaluation(["embed", *(str(argument) for argument in arguments)])
    finally:
        torch.set_num_threads(threads)
        _close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pt"
    torch.save(build_backbone("small", embedding_size=16).state_dict(), path)
    return path


@pytest.fixture
def faulty(packed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The packed set, and embeddings in which sample 3 of label 0 looks like label 5, label 7 is label 6, label 9 holds
    two persons, and samples 21 and 20 are copies."""
    case = persons(IDENTITIES + 1, IMAGES, seed=4)
    x_ND = case.x_ND[:N].copy()
    x_ND[3] = case.x_ND[5 * IMAGES : 5 * IMAGES + 4].mean(0)
    x_ND[7 * IMAGES : 8 * IMAGES] = persons(IDENTITIES + 1, 2 * IMAGES, seed=4).x_ND[12 * IMAGES : 13 * IMAGES]
    x_ND[6 * IMAGES : 7 * IMAGES] = persons(IDENTITIES + 1, 2 * IMAGES, seed=4).x_ND[13 * IMAGES : 14 * IMAGES]
    x_ND[9 * IMAGES + 5 : 10 * IMAGES] = case.x_ND[N : N + 3]
    x_ND[21] = x_ND[20]
    np.save(tmp_path / "x.npy", x_ND.astype(np.float16))
    return packed, tmp_path / "x.npy"


def test_embeddings_are_unit_rows_and_bad_images_rows_of_zeros(
    packed: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    records = RecordSet.open(packed)
    images = [(records.image(sample)[0], bytes(records.image(sample)[1])) for sample in range(40)]
    images[7] = (images[7][0], images[7][1][:200])
    write_records(broken / "train.rec", broken / "train.idx", images, num_classes=5)
    (broken / "property").write_text(Properties(num_classes=5, image_size=(112, 112)).text(), encoding="ascii")
    out = tmp_path / "deep" / "x.npy"
    arguments = ("--weights", weights, "--backbone", "small", "--embedding-size", 16, "--records", broken)
    assert embed(*arguments, "--out", out, "--batch-size", 7, "--dtype", "float32") == 0
    assert "1 images do not decode" in capsys.readouterr().out
    x_ND = np.load(out)
    assert x_ND.shape == (40, 16)
    assert not x_ND[7].any()
    assert np.linalg.norm(np.delete(x_ND, 7, axis=0), axis=1) == pytest.approx(1, abs=1e-6)
    backbone = build_backbone("small", embedding_size=16)
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    pixels = torch.from_numpy(decode_image(images[3][1], (112, 112)).astype(np.float64)).permute(2, 0, 1)[None]
    with torch.no_grad():
        x_13HW = (pixels - 127.5) / 127.5
        plain = backbone.double().eval()(x_13HW) + backbone(x_13HW.flip(-1))
    assert x_ND[3] == pytest.approx((plain / plain.norm()).numpy()[0], abs=1e-5)
    assert embed(*arguments, "--out", out) == 2
    assert "or replace it with --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backbone", "small", "--embedding-size", 8), "expected the weights of small with 8 components"),
        (("--backbone", "iresnet18"), "name the backbone and size that they were trained with"),
        ((), "expected --run FOLDER, or --weights and --backbone"),
    ],
)
def test_wrong_weights_are_one_line(
    packed: Path,
    weights: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.npy"
    assert embed("--weights", weights, *arguments, "--records", packed, "--out", out) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not out.exists()
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert embed("--weights", tmp_path / "bad.pt", "--backbone", "small", "--records", packed, "--out", out) == 2
    assert "damaged, or not a file of weights" in capsys.readouterr().err


def test_report_and_clean(
    command: Call, faulty: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, embeddings = faulty
    original = {path.name: path.read_bytes() for path in records.iterdir()}
    folder, out = tmp_path / "report", tmp_path / "cleaned"
    assert command("report", embeddings, "--records", records, "--out", folder) == 0
    assert "1 suspected wrong labels, 1 duplicate identities, 1 split identities, 1 copies" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "index.html"])
    assert "data:image/jpeg;base64," in (folder / "index.html").read_text(encoding="utf-8")
    first = (folder / "index.html").read_bytes()
    assert command("report", embeddings, "--records", records, "--out", folder) == 2
    assert command("report", embeddings, "--records", records, "--out", folder, "--force") == 0
    assert (folder / "index.html").read_bytes() == first

    flags = ("--relabel", "--drop-noise", "--split", "--merge-duplicates", "--drop-copies")
    arguments = ("clean", folder, "--records", records, "--out", out, *flags)
    assert command(*arguments, "--dry-run") == 0
    assert not out.exists()
    assert command(*arguments, "--min-images", 4) == 0
    cleaned, before = RecordSet.open(out), RecordSet.open(records)
    # Label 7 joined 6; the second person of 9 had three images, fewer than asked for.
    assert cleaned.num_classes == IDENTITIES - 1
    assert cleaned.num_samples == N - 1 - 3
    lines = [line.split("\t") for line in (out / "train.lst").read_text(encoding="ascii").splitlines()]
    assert [int(key) for key, _, _ in lines] == list(range(1, N - 3))
    for sample, (_, label, old) in enumerate(lines):
        assert cleaned.image(sample)[0] == int(label)
        assert bytes(cleaned.image(sample)[1]) == bytes(before.image(int(old))[1])
    place = {int(old): int(label) for _, label, old in lines}
    assert place[3] == place[5 * IMAGES]
    assert place[7 * IMAGES] == place[6 * IMAGES]
    assert 21 not in place
    with (out / "changes.csv").open(encoding="utf-8", newline="") as file:
        changes = {int(row["sample"]): row for row in csv.DictReader(file)}
    assert sorted(changes) == [3, 21, *range(7 * IMAGES, 8 * IMAGES), *range(9 * IMAGES + 5, 10 * IMAGES)]
    assert (changes[21]["new_label"], changes[21]["why"]) == ("dropped", "copy of 20")
    assert {path.name: path.read_bytes() for path in records.iterdir()} == original


def test_labels_alone_give_a_report_without_pictures(
    command: Call, faulty: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, folder = tmp_path / "labels.npy", tmp_path / "report"
    np.save(labels, np.repeat(np.arange(IDENTITIES, dtype=np.int32), IMAGES))
    assert command("report", faulty[1], "--labels", labels, "--out", folder) == 0
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "1 suspected wrong labels" in capsys.readouterr().out
    for wrong in (np.arange(3), np.full(N, 10**9), np.full(N, -1), np.zeros(N), np.zeros((N, 1), np.int64)):
        np.save(labels, wrong)
        assert command("report", faulty[1], "--labels", labels, "--out", tmp_path / "other") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_a_review_decides_what_is_cleaned(command: Call, packed: Path, tmp_path: Path) -> None:
    """No row, no change; chains of duplicates become one label; a copy stays where its original goes."""
    write(tmp_path / "report", noise=[Noise(1.0, 0, 0, "open", -1, 0.0, 0.0, False)],
          duplicates=[Duplicate(0.9, 4, 3, 0.9, 8, 8), Duplicate(0.9, 4, 5, 0.9, 8, 8)],
          copies=[Copy(1.0, 1, 0, 0, 0), Copy(1.0, 2, 0, 0, 0)])  # fmt: skip
    flags = ("--drop-noise", "--merge-duplicates", "--drop-copies")
    assert command("clean", tmp_path / "report", "--records", packed, "--out", tmp_path / "out", *flags) == 0
    cleaned = RecordSet.open(tmp_path / "out")
    assert cleaned.num_classes == IDENTITIES - 2
    assert np.bincount(cleaned.labels)[:4].tolist() == [IMAGES - 2, IMAGES, IMAGES, 3 * IMAGES]
    assert (tmp_path / "out" / "labels.csv").read_text(encoding="utf-8").splitlines()[4] == "3,3 4 5"


def write(folder: Path, **tables: list[object]) -> None:
    folder.mkdir(exist_ok=True)
    for name, kind in FILES.items():
        rows = tables.get(name.removesuffix(".csv"), [])
        (folder / name).write_text(table_text(kind, rows), encoding="utf-8")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("tables", "flags", "words"),
    [
        ({}, (), "expected at least one of --relabel"),
        ({"noise": [Noise(1.0, 8, 0, "open", -1, 0.0, 0.0, False)]}, ("--drop-noise",), "expected label 1, as the rec"),
        ({"noise": [Noise(1.0, N, 0, "open", -1, 0.0, 0.0, False)]}, ("--drop-noise",), f"expected 0 … {N - 1}, got"),
        ({"noise": [Noise(1.0, 0, 0, "open", 2, 0.0, 0.0, False)]}, ("--relabel",), "-1 for open, got open and 2"),
        ({"noise": [Noise(1.0, 0, 0, "closed", 99, 0.0, 0.0, False)]}, ("--relabel",), "looks_like: expected -1 …"),
        ({"noise": [Noise(1.0, 0, 0, "open", -1, 0.0, 0.0, False)] * 2}, ("--drop-noise",), "expected one row"),
        ({"splits": [Split(1.0, 0, 1, -1, (1, 2), 5), Split(1.0, 0, 2, -1, (2, 3), 5)]}, ("--split",), "one row"),
        ({"copies": [Copy(1.0, 1, 0, 0, 0), Copy(1.0, 0, 0, 2, 0)]}, ("--drop-copies",), "or what others are copies"),
        ({"duplicates": [Duplicate(1.0, 2, 2, 0.9, 8, 8)]}, ("--merge-duplicates",), "got the same twice"),
        ({"duplicates": [Duplicate(1.0, 2, 77, 0.9, 8, 8)]}, ("--merge-duplicates",), "is the report of another set?"),
        ({}, ("--min-images", "9"), "nothing would be left"),
    ],
)
def test_reports_that_do_not_fit_are_one_line(
    command: Call,
    packed: Path,
    tmp_path: Path,
    tables: dict[str, list[object]],
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "report", **tables)
    assert command("clean", tmp_path / "report", "--records", packed, "--out", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_original_set_is_never_a_place_to_write_to(command: Call, packed: Path, tmp_path: Path) -> None:
    records = tmp_path / "sets" / "mine"
    shutil.copytree(packed, records)
    (tmp_path / "link").symlink_to(records)
    write(tmp_path / "report")
    for out in (records, records / "cleaned", tmp_path / "sets", tmp_path / "link", tmp_path / "report"):
        arguments = ("clean", tmp_path / "report", "--records", records, "--out", out, "--drop-noise")
        assert command(*arguments) == 2
    assert sorted(path.name for path in records.iterdir()) == sorted(path.name for path in packed.iterdir())
