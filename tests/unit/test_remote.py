"""Sets in an object store, served by a real S3 server: the same as the local ones, and each byte is asked for once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.__main__ import main
from data.errors import DataError
from data.loading.loader import build_loader
from data.making.pack import write_records
from data.rec.records import RecordSet
from data.stores import blocks, remote, remote_records
from data.stores.cache import Cache
from tests.conftest import STORE_KEYS as KEYS
from tests.image_cases import jpeg
from tests.record_files import image_record, insightface_records, write_set

COUNTS = [30, 0, 20, 41]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, remote_records):
        monkeypatch.setattr(module, "BLOCK", 512)
    monkeypatch.setattr(blocks, "_PAUSE_S", 0.01)


def _put(bucket: Any, folder: Path) -> str:
    files, name = bucket
    files.put(f"{folder}/", f"{name}/sets/{folder.name}/", recursive=True)
    files.invalidate_cache()
    return f"s3://{name}/sets/{folder.name}"


def _property(folder: Path) -> Path:
    (folder / "property").write_text("1,112,112\n")
    return folder


def _same(far: RecordSet, near: RecordSet) -> None:
    assert (far.num_samples, far.num_classes, far.layout) == (near.num_samples, near.num_classes, near.layout)
    assert far.labels.tolist() == near.labels.tolist()
    order = np.random.default_rng(0).permutation(near.num_samples).tolist()
    for sample in order:
        label, image = far.image(sample)
        assert (label, bytes(image)) == (near.labels[sample], bytes(near.image(sample)[1]))


@pytest.mark.parametrize("kind", ["insightface", "sequential", "parts", "no index"])
def test_a_set_is_the_same_there_as_here(bucket: Any, tmp_path: Path, kind: str) -> None:
    records = insightface_records(COUNTS)
    if kind == "insightface":
        folder = write_set(tmp_path / "set", records, classes=4)
    else:
        images = records[: sum(COUNTS)]
        folder = write_set(tmp_path / "set", images, classes=4)
    if kind == "no index":
        (folder / "train.idx").unlink()
    if kind == "parts":
        for name in ("rec", "idx"):
            (folder / f"train.{name}").rename(folder / f"train_1.{name}")
        (folder / "train_2.rec").write_bytes((folder / "train_1.rec").read_bytes())
        (folder / "train_2.idx").write_bytes((folder / "train_1.idx").read_bytes())
    address, cache = _put(bucket, folder), Cache(tmp_path / "cache")
    far = RecordSet.open(address, cache)
    assert far.far
    assert far.address == address
    _same(far, RecordSet.open(folder, cache))
    again = pickle.loads(pickle.dumps(far))
    _same(again, RecordSet.open(folder, cache))
    for each in (far, again):
        each.close()


def test_each_byte_is_asked_for_once(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", insightface_records(COUNTS), classes=4)
    address, cache = _put(bucket, folder), Cache(tmp_path / "cache")
    asked = []
    fetch = remote.Store.fetch

    def counted(self: remote.Store, name: str, begin: int, end: int) -> bytes:
        asked.append((name, begin, end))
        return fetch(self, name, begin, end)

    monkeypatch.setattr(remote.Store, "fetch", counted)
    far = RecordSet.open(address, cache)
    far.ahead(np.arange(far.num_samples))
    _same(far, RecordSet.open(folder, cache))
    far.close()
    images = [(begin, end) for name, begin, end in asked if name == "train.rec" and end - begin == 512]
    assert len(images) == len(set(images)) > 3
    count = len(asked)
    again = RecordSet.open(address, cache)
    _same(again, RecordSet.open(folder, cache))
    again.close()
    assert len(asked) == count


def test_opening_a_set_with_identity_headers_reads_few_places(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set", insightface_records([200] * 10), classes=10)
    asked: list[int] = []
    fetch = remote.Store.fetch

    def counted(self: remote.Store, name: str, begin: int, end: int) -> bytes:
        if name == "train.rec":
            asked.append(end - begin)
        return fetch(self, name, begin, end)

    monkeypatch.setattr(remote.Store, "fetch", counted)
    far = RecordSet.open(_put(bucket, folder), Cache(tmp_path / "cache"))
    assert far.labels.tolist() == np.repeat(np.arange(10), 200).tolist()
    assert far.bytes // 512 > 150
    assert len(asked) < 30
    assert sum(asked) < far.bytes / 4
    far.close()


_OPEN = """
import sys
from data.stores import blocks, remote, remote_records
from data.rec.records import RecordSet
blocks.BLOCK = remote_records.BLOCK = 512
fetched, fetch = [], remote.Store.fetch
def counted(self, name, begin, end):
    fetched.append(end - begin if name == "train.rec" else 0)
    return fetch(self, name, begin, end)
remote.Store.fetch = counted
records = RecordSet.open(sys.argv[1])
assert records.labels.tolist() == [n % 7 for n in range(900)]
print(sum(fetched))
"""


def test_the_ranks_of_a_host_find_out_once(bucket: Any, endpoint: str, tmp_path: Path) -> None:
    """Without an index and identity headers all of the file has to be read: by one of them."""
    folder = write_set(tmp_path / "set", [image_record(n, [n % 7], b"image" * 9) for n in range(900)], classes=7)
    (folder / "train.idx").unlink()
    address = _put(bucket, folder)
    settings = {"FSSPEC_S3_ENDPOINT_URL": endpoint, "CLUSTERFACE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **KEYS, **settings}
    command = [sys.executable, "-c", _OPEN, address]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    fetched = [int(rank.communicate(timeout=120)[0]) for rank in ranks]
    size = (folder / "train.rec").stat().st_size
    assert size <= sum(fetched) < 1.3 * size


def test_a_file_that_changes_meanwhile_ends_the_run(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_LOOK_AGAIN", 4)
    folder = write_set(tmp_path / "set", [image_record(n, [0], b"image" * 20) for n in range(200)], classes=1)
    address = _put(bucket, folder)
    far = RecordSet.open(address, Cache(tmp_path / "cache"))
    write_set(folder, [image_record(n, [0], b"other" * 20) for n in range(200)], classes=1)
    _put(bucket, folder)
    with pytest.raises(DataError, match=rf"{address}/train\.rec: it was changed while it was read"):
        deque(map(far.image, range(200)))
    far.close()


def test_a_file_that_was_replaced_is_another_file(bucket: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = write_set(tmp_path / "set", [image_record(n, [n % 2], b"old") for n in range(9)], classes=2)
    far = RecordSet.open(_put(bucket, first), cache)
    assert bytes(far.image(3)[1]) == b"old"
    far.close()
    second = write_set(
        tmp_path / "set", [image_record(n, [0, 1, 1][n % 3 : n % 3 + 1], b"new") for n in range(9)], classes=2
    )
    again = RecordSet.open(_put(bucket, second), cache)
    assert bytes(again.image(3)[1]) == b"new"
    assert again.labels.tolist() == [0, 1, 1] * 3
    again.close()


def test_what_is_wrong_is_said_in_one_line(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, name = bucket
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError, match=rf"s3://{name}/nowhere: nothing is there: expected a folder with train.rec"):
        RecordSet.open(f"s3://{name}/nowhere", cache)
    folder = write_set(tmp_path / "set", [image_record(n, [0]) for n in range(99)], classes=1)
    (folder / "property").rename(folder / "properties")
    address = _put(bucket, folder)
    with pytest.raises(DataError, match=r"set/property: missing: expected a first line"):
        RecordSet.open(address, cache)
    with pytest.raises(DataError, match=r"gone://here: expected a driver for such addresses .*: install the one"):
        RecordSet.open("gone://here", cache)
    assert RecordSet.open(f"file://{_property(folder)}", cache).address == str(folder)
    (folder / "property").unlink()
    (folder / "property").write_text("1,112,112\n")
    far = RecordSet.open(_put(bucket, folder), Cache(tmp_path / "other"))
    monkeypatch.setattr(remote.Store, "fetch", lambda *_: b"")
    with pytest.raises(DataError, match=rf"{address}/train\.rec: bytes 512 … 1024 did not come in 4 tries"):
        far.image(20)
    far.close()


@pytest.mark.parametrize("sampler", ["shuffle", "windows"])
def test_loaders_give_the_same_batches(
    bucket: Any, tmp_path: Path, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (blocks, remote_records):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    folder = tmp_path / "set"
    folder.mkdir()
    images = ((n // 5, jpeg(n)) for n in range(60))
    write_records(folder / "train.rec", folder / "train.idx", images, num_classes=12)
    (folder / "property").write_text("12,112,112\n")
    cache = Cache(tmp_path / "cache")
    batches = []
    for where in (folder, _put(bucket, folder)):
        records = RecordSet.open(where, cache)
        loader = build_loader(
            records, batch_size=8, rank=0, world_size=1, seed=1, backend="cpu", device=torch.device("cpu"),
            threads=2, prefetch=2, flip=True, sampler=sampler, window=1024,
        )  # fmt: skip
        batches.append(list(loader.epoch(0)))
        records.close()
    assert len(batches[0]) == len(batches[1]) == 7
    for near, far in zip(*batches, strict=True):
        assert near.sample_ids.equal(far.sample_ids)
        assert near.labels.equal(far.labels)
        assert near.images.equal(far.images)


@pytest.mark.slow
def test_training_from_a_store(bucket: Any, endpoint: str, tmp_path: Path) -> None:
    """Records and the verification set come from there."""
    cache = str(tmp_path / "cache")
    environment = {**os.environ, **KEYS, "FSSPEC_S3_ENDPOINT_URL": endpoint, "CLUSTERFACE_CACHE": "/dev/null/unused"}
    pack = "-m data pack synthetic --identities 8 --images-per-identity 6 --verification-identities 5 --pairs 10"
    command = [sys.executable, *pack.split(), "--workers", "1", "--out", str(tmp_path / "set")]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    settings = (
        f"data.path={_put(bucket, tmp_path / 'set')}", f"data.cache={cache}", f"train.output={tmp_path / 'run'}",
        "data.sampler=windows", "model.backbone=small", "train.batch_size=16", "train.epochs=1", "train.log_steps=1",
        "eval.sets=[verification.bin]", "clustering.enabled=false", "train.precision=fp32",
    )  # fmt: skip
    command = [sys.executable, "train_dist.py", *(part for setting in settings for part in ("--set", setting))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "48 images of 8 identities" in done.stderr
    assert (tmp_path / "run" / "backbone.pt").is_file()
    assert len((tmp_path / "run" / "verification.jsonl").read_text().splitlines()) == 2
    assert list((Path(cache) / "blocks").rglob("0*"))


def test_commands_take_addresses(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(n // 3, jpeg(n)) for n in range(12)]
    folder = tmp_path / "set"
    folder.mkdir()
    write_records(folder / "train.rec", folder / "train.idx", images, num_classes=4)
    (folder / "property").write_text("4,112,112\n")
    (folder / "identities.txt").write_text("ada\nbert\ncleo\ndora\n")
    monkeypatch.setenv("CLUSTERFACE_CACHE", str(tmp_path / "cache"))
    address = _put(bucket, folder)
    assert main(["inspect", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert main(["subset", address, "--out", str(tmp_path / "new"), "--identities", "2"]) == 0
    made = RecordSet.open(tmp_path / "new")
    assert made.num_samples == 6
    names = (tmp_path / "new" / "identities.txt").read_text().split()
    assert set(names) < {"ada", "bert", "cleo", "dora"}
    assert main(["convert", address, "--out", str(tmp_path / "shards")]) == 0
    assert (tmp_path / "shards" / "000000.tar").is_file()
