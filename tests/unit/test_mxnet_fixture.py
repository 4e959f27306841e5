"""Files that genuine mxnet and its im2rec.py wrote (tests/fixtures/mxnet) are read right, and written alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.__main__ import main
from data.rec.header import unpack
from tests.mxnet_cases import FIXTURE, MxnetSets

SETS = MxnetSets(FIXTURE)
NAMES = sorted(SETS.expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_payload(name: str) -> None:
    SETS.check_payloads(name)


@pytest.mark.parametrize("name", NAMES)
def test_written_alike(name: str, tmp_path: Path) -> None:
    SETS.check_written_alike(name, tmp_path)


@pytest.mark.parametrize("name", SETS.with_images)
def test_rebuilt_index(name: str, tmp_path: Path) -> None:
    SETS.check_rebuilt(name, tmp_path)


@pytest.mark.parametrize("name", SETS.with_images)
def test_sets(name: str, tmp_path: Path) -> None:
    SETS.check_set(name, tmp_path)


def test_the_fixture_has_what_its_sets_are_for() -> None:
    assert len(SETS.with_images) == 8
    assert all(SETS.records_in_parts(name) for name in NAMES)
    keys = [row["key"] for row in SETS.rows("im2rec")]
    assert keys != sorted(keys), "im2rec.py shuffles, and keys stay with their files"
    assert not (FIXTURE / "no_index" / "train.idx").exists()


def test_array_labels() -> None:
    for name in ("array_labels", "im2rec_labels"):
        offset = next(row["offset"] for row in SETS.rows(name) if row["key"] == 5)
        header, _ = unpack(SETS.reader(name).read_at(offset))
        assert header == (11, (1.0, *(5 + i / 4 for i in range(10))), 5, 0)


def test_verify_finds_nothing_but_the_stand_ins_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    for name in SETS.with_images:
        if name != "no_index":
            assert main(["verify", str(FIXTURE / name), "--json"]) == 1
            found = json.loads(capsys.readouterr().out)
            assert found["counts"] == {"image": 12}
            assert (found["images"], found["labels"]) == (12, 4)
