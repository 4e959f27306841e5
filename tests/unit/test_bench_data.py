"""The benchmark of loaders on tiny sets: every way delivers every image, and rows and files say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.loaders.arms import (
    AUGMENTED,
    BARE,
    DALI_READER,
    DATA_LOADER,
    FILLING,
    FLOATS,
    OURS,
    OURS_DALI,
    Arm,
    Outcome,
    arms,
    run,
)
from benchmarks.loaders.peers import RecordDataset, dali_reader, data_loader
from benchmarks.loaders.records import working_copy
from data.loading.decode import decode_image
from tests.image_cases import SIZE, damaged_images, jpeg, odd_images
from tests.record_files import Record, image_record, write_set

CPU = torch.device("cpu")
WAYS = [BARE, FILLING, OURS, FLOATS, AUGMENTED, OURS_DALI, DALI_READER]


def _insightface(images: list[bytes], counts: list[int]) -> list[Record]:
    """Images by class, identity headers, key 0."""
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    records = [
        image_record(key, [label], image) for key, (label, image) in enumerate(zip(labels, images, strict=True), 1)
    ]
    ends, start = 1 + np.cumsum(counts), len(images) + 1
    heads = [image_record(start + c, [int(ends[c]) - count, int(ends[c])], b"") for c, count in enumerate(counts)]
    return [*records, *heads, image_record(0, [start, start + len(counts)], b"")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 6 identities, which have headers."""
    images = [jpeg(seed) for seed in range(60)]
    return write_set(tmp_path_factory.mktemp("set"), _insightface(images, [10] * 6), classes=6)


def test_encoded_anew_with_the_quality_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for quality in (None, 50, 100):
        for source in (folder, None):
            with working_copy(source, 20, quality) as records:
                images = [records.image(sample)[1] for sample in range(20)]
                sizes[source, quality] = sum(map(len, images))
                assert quality != 100 or all(b"\x00" + b"\x01" * 64 in bytes(image) for image in images)  # divides by 1
                for image in images:
                    decode_image(image, records.image_size)
    for source in (folder, None):
        assert sizes[source, 50] < sizes[source, 100]
        assert sizes[source, None] != sizes[source, 100]
    with pytest.raises(SystemExit):
        data.main(["--quality", "101"])
    assert "expected a --quality from 1 to 100, got 101" in capsys.readouterr().err


def test_drawn_faces_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali")
    out = tmp_path / "new folder" / "data.md"
    assert data.main(["--images", "200", "--batch", "20", "--repeats", "2", "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, out.read_text(encoding="utf-8")
    for fact in ("date: ", "hardware: ", "command: `python -m benchmarks.data", "records: 200 images", "simplejpeg "):
        assert fact in text
    assert "left out" not in text
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    expected = [*((threads, way) for threads in "12" for way in WAYS), ("2 workers", DATA_LOADER)]
    assert [(row["threads"], row["way"]) for row in rows] == expected
    for row in rows:
        assert row["images"] == 200
        assert len(row["wall"]) == len(row["cpu"]) == 2
        assert min(row["wall"]) > 0
        assert min(row["cpu"]) > 0
        assert f"| {row['threads']} | {row['way']} |" in text
    assert "bare simplejpeg" in printed


def test_every_way_delivers_every_image(folder: Path) -> None:
    pytest.importorskip("nvidia.dali")
    with working_copy(folder, 60) as records:
        assert records.layout == "sequential"
        found, left_out = arms(records, batch=12, threads=[1, 2], device=CPU)
        assert not left_out
        assert len(found) == 2 * len(WAYS) + 1
        for arm in found:
            outcome = run(arm, 5, CPU)
            assert (outcome.images, outcome.label_sum) == (60, int(records.labels.sum())), arm
            assert run(arm, 2, CPU).images == 24, arm
    assert not Path(records.address).exists()


def test_a_way_that_delivers_less_is_refused(folder: Path) -> None:
    arm = Arm("lazy", "1", lambda steps: iter([(12, 30)]))
    with working_copy(folder, 60) as records:
        with pytest.raises(RuntimeError, match="lazy: expected 24 images"):
            data._check(arm, run(arm, 2, CPU), records, 24)
        with pytest.raises(RuntimeError, match="labels that sum to 150"):
            data._check(arm, Outcome(wall=1, cpu=1, images=60, label_sum=149), records, 60)
        data._check(arm, Outcome(wall=1, cpu=1, images=60, label_sum=150), records, 60)


def test_the_copy_has_the_first_good_jpegs(tmp_path: Path) -> None:
    (bad, _), odd = damaged_images()["half"], odd_images()
    images = [jpeg(0), bad, odd["png"], jpeg(1), odd["grey"], jpeg(2), jpeg(3)]
    folder = write_set(tmp_path, _insightface(images, [1, 2, 3, 1]), classes=4)
    with working_copy(folder, 6) as records:
        assert [bytes(records.image(sample)[1]) for sample in range(4)] == [jpeg(0), jpeg(1), odd["grey"], jpeg(2)]
        assert records.labels.tolist() == [0, 1, 1, 1]
        assert (records.num_classes, records.image_size) == (2, SIZE)


def test_peers_deliver_normalised_images(folder: Path) -> None:
    pytest.importorskip("nvidia.dali")
    with working_copy(folder, 60) as records:
        dataset = RecordDataset(Path(records.address))
        truth = torch.from_numpy(np.stack([decode_image(records.image(sample)[1], SIZE) for sample in range(60)]))
        truth_N3HW = (truth.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        either_2N3HW = torch.stack([truth_N3HW, truth_N3HW.flip(3)])
        x_3HW, label = dataset[25]
        assert (either_2N3HW[:, 25] - x_3HW).abs().amax(dim=(1, 2, 3)).min() < 1e-6
        assert int(label) == records.labels[25]
        for batches in (
            data_loader(Path(records.address), batch=20, steps=3, device=CPU),
            dali_reader(Path(records.address), batch=20, steps=3, threads=1, device=CPU),
        ):
            found: list[int] = []
            for images_B3HW, labels_B in batches:
                assert images_B3HW.dtype == torch.float32
                assert labels_B.dtype == torch.int64
                for x_3HW, label in zip(images_B3HW, labels_B.tolist(), strict=True):
                    distance_N = (either_2N3HW - x_3HW).abs().amax(dim=(2, 3, 4)).amin(0)
                    found.append(int(distance_N.argmin()))
                    assert distance_N.min() < 2.5 / 127.5
                    assert label == records.labels[found[-1]]
            assert sorted(found) == list(range(60)), "each image once"


def test_dali_is_left_out_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with working_copy(folder, 60) as records:
        found, left_out = arms(records, batch=12, threads=[1], device=CPU)
    assert {arm.way for arm in found} == {BARE, FILLING, OURS, FLOATS, AUGMENTED, DATA_LOADER}
    assert left_out.keys() == {OURS_DALI, DALI_READER}
    assert all("DALI does not load" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    "wrong",
    [
        ["--images", "10", "--batch", "20"],
        ["--threads", "0"],
        ["--threads", "2", "2"],
        ["--batch", "0"],
        ["--repeats", "0"],
        ["--folder", "/nowhere/at/all"],
    ],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        data.main(wrong)
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_a_set_of_fewer_images_than_a_batch_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        data.main(["--folder", str(folder), "--batch", "61"])
    assert ended.value.code == 2
    assert "a batch of 61, found 60" in capsys.readouterr().err


def test_ratios_are_those_of_as_many_threads() -> None:
    def row(way: str, threads: str, wall: float, cpu: tuple[float, ...]) -> data.Row:
        return data.Row(way=way, threads=threads, images=100, wall=(wall,), cpu=cpu)

    rows = [
        *(row(BARE, "1", 1, (1,)), row(DALI_READER, "1", 4, (4,))),
        *(row(BARE, "2", 1, (2, 1, 9)), ours := row(OURS, "2", 2, (4,)), row(DALI_READER, "2", 4, (16,))),
        loader := row(DATA_LOADER, "2 workers", 12, (20,)),
    ]
    texts = dict(zip(data.HEADER, data.cells(ours, rows), strict=True))
    assert (texts["images/s"], texts["images/CPU s"], texts["of bare"]) == ("50", "25", "50%")
    assert (texts["x DataLoader"], texts["x DALI"]) == ("5.00", "4.00")
    assert (texts["clock x DataLoader"], texts["clock x DALI"]) == ("6.00", "2.00")
    assert data.cells(loader, rows)[6] == "5%", "of the first"
    assert data.cells(ours, [ours, rows[0]])[7:9] == ("-", "-")
