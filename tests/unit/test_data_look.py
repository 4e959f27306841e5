"""`python -m data inspect` and `preview`: numbers for people and machines, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.__main__ import main
from data.contact_sheet import contact_sheet
from data.loading.decode import decode_image
from data.making.pack import write_records
from data.rec.records import RecordSet
from data.verification_bin import write_bin
from tests.image_cases import SIZE, jpeg

COUNTS = (9, 0, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    labels = np.repeat(np.arange(len(COUNTS)), COUNTS).tolist()
    images = ((label, jpeg(number)) for number, label in enumerate(labels))
    write_records(folder / "train.rec", folder / "train.idx", images, num_classes=len(COUNTS))
    (folder / "property").write_text("4,112,112\n")
    return folder


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["identities"], found["layout"]) == (12, 4, "insightface")
    assert (found["identities without images"], found["identities with one image"]) == (1, 1)
    assert found["formats of 12 images"] == "12 JPEG"
    assert main(["inspect", str(folder)]) == 0
    assert "identities without images: 1" in capsys.readouterr().out.splitlines()


def test_pictures(folder: Path, tmp_path: Path) -> None:
    sheet, histogram = tmp_path / "sheet.png", tmp_path / "histogram.png"
    assert main(["inspect", str(folder), "--sheet", str(sheet), "--histogram", str(histogram)]) == 0
    records = RecordSet.open(folder)
    rows = [[decode_image(records.image(n)[1], SIZE) for n in samples] for samples in (range(8), (9, 10), (11,))]
    captions = ["class 0, samples 0, 1, 2, 3, 4, 5, 6, 7", "class 2, samples 9, 10", "class 3, samples 11"]
    assert np.array_equal(_pixels(sheet), contact_sheet(rows, captions=captions))
    picture = _pixels(histogram)
    blue = (np.abs(picture.astype(int) - (0x44, 0x77, 0xAA)).max(2) < 8).any(0)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], blue.astype(int), [0]])) == 1)
    assert len(runs) == 2, "bars of 1 and 2 images side by side, and one of 9 apart"


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, sheet = tmp_path / "lfw.bin", tmp_path / "sheet.png"
    images = [jpeg(n % 19) for n in range(24)]
    images[7] = b"\xff\xd8 no image"
    write_bin(path, images, [n % 3 == 0 for n in range(12)])
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["pairs of one person"], found["different images"]) == (12, 4, 19)
    assert found["images that do not decode"] == 1
    assert found["the first of them"].startswith("image 7: damaged JPEG")
    images[7] = jpeg(7)
    write_bin(path, images, [n % 3 == 0 for n in range(12)])
    assert main(["inspect", str(path), "--sheet", str(sheet)]) == 0
    rows = [[decode_image(image, SIZE) for image in images[2 * n : 2 * n + 2]] for n in range(8)]
    captions = [f"{n}: {'one person' if n % 3 == 0 else 'two'}" for n in range(8)]
    assert np.array_equal(_pixels(sheet), contact_sheet(rows, captions=captions))
    assert main(["inspect", str(path), "--histogram", str(sheet)]) == 2
    assert "a .bin has none" in capsys.readouterr().err


def test_preview_shows_what_training_sees(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "preview.png"
    command = ["preview", str(folder), "--out", str(out), "--images", "3"]
    settings = ["--set", "augment.occlusion=1", "--set", "augment.blur=0.5"]
    assert main([*command, *settings]) == 0
    first = _pixels(out)
    gap, caption, side = 4, 16, 112
    assert first.shape == (gap + 3 * (caption + side + gap), gap + 9 * (side + gap), 3)
    plain = first[gap + caption :][:side, gap : gap + side]
    assert np.array_equal(plain, decode_image(RecordSet.open(folder).image(0)[1], SIZE))
    for column in range(1, 9):
        left = gap + column * (side + gap)
        assert ((first[gap + caption :][:side, left : left + side] == 0).all(2)).sum() > 0.01 * side**2
    assert main([*command, *settings, "--set", "train.seed=1"]) == 0
    assert not np.array_equal(_pixels(out), first)
    capsys.readouterr()
    assert main(command) == 2
    assert "--set augment.blur=0.5" in capsys.readouterr().err
    assert main([*command, "--set", "augment.blur=2"]) == 2
    assert "augment.blur" in capsys.readouterr().err
