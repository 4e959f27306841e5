"""What the doctor says of planted faults of disk, data and memory; as in test_doctor.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backbones import IMAGE_SIZE, build_backbone
from configs.schema import (
    ClusteringConfig,
    ConfigError,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from data.errors import DataError
from data.loading.decode import DecodeError
from data.stores.cache import Cache
from training.doctor import dataset, disk, memory

MB, GB = 10**6, 10**9


# ---- disk ----------------------------------------------------------------------------------------------------------


def test_output_is_left_as_it_was(tmp_path: Path) -> None:
    finding = disk.output(tmp_path / "a" / "b", "train.output")
    assert "can be written" in finding.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_output_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"train\.output: cannot write .* to "):
        disk.output(tmp_path / place, "train.output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_speed_and_room() -> None:
    assert disk.write_speed(1e6, Path("x")).state == "warn"
    assert disk.write_speed(1e9, Path("x")).state == "pass"
    train = TrainConfig(keep_checkpoints=2, keep_best=1)
    assert disk.room(4 * GB, 0, GB, train).state == "pass"
    full = disk.room(4 * GB - 1, 0, GB, train)
    assert full.state == "fail"
    assert "expected 4.0 GB for 4 checkpoints of up to 1.0 GB, 3 of them kept" in full.text
    assert disk.room(GB, 3 * GB, GB, train).state == "pass", "those that are there go"


def test_places(tmp_path: Path) -> None:
    assert disk.checkpoint_folder(TrainConfig(output="o")) == Path("o/checkpoints")
    assert disk.checkpoint_folder(TrainConfig(checkpoints="c")) == Path("c")
    assert disk.checkpoint_folder(TrainConfig(checkpoints="s3://bucket/run")) is None
    assert disk.free_at(tmp_path / "a" / "b") > 0
    (tmp_path / "x").write_bytes(b"123")
    assert (disk.held_by(tmp_path), disk.held_by(tmp_path / "none")) == (3, 0)
    cache = Cache(tmp_path, 10 * GB)
    assert disk.cache(GB, 0, cache, 5 * GB).state == "warn"
    assert disk.cache(GB, 4 * GB, cache, 5 * GB).state == "pass"


# ---- data ----------------------------------------------------------------------------------------------------------


class _Set:
    image_size, far = IMAGE_SIZE, False

    def __init__(self, samples: int) -> None:
        self.num_samples, self.labels = samples, np.arange(samples) % 4

    def image(self, sample: int) -> tuple[int, memoryview]:
        return 0, memoryview(bytes([sample % 256]))


@pytest.fixture
def every_64th_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(encoded: memoryview, size: tuple[int, int]) -> None:
        if encoded[0] % 64 == 0:
            raise DecodeError("planted")

    monkeypatch.setattr(dataset, "decode_image", decode)


@pytest.mark.usefixtures("every_64th_is_bad")
def test_images_that_do_not_decode() -> None:
    few = dataset.decoded(_Set(256), 100)  # type: ignore[arg-type]
    assert (few.state, few.text) == ("warn", "4 of 256 images do not decode (sample 0: planted)")
    assert "--fix" in few.cure
    many = dataset.decoded(_Set(256), 3)  # type: ignore[arg-type]
    assert many.state == "fail"
    assert "about 4 of the set, data.max_bad_images allows 3" in many.text


def test_epochs() -> None:
    config = RunConfig(train=TrainConfig(batch_size=8, accumulation=2, epochs=3))
    assert dataset.epoch(_Set(100), config, 2).text == "3 steps of 32 images (2 rank(s) x 8 x 2), 9 in all"  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch too large"):
        dataset.epoch(_Set(100), config, 16)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train\.accumulation"):
        dataset.epoch(_Set(100), config, 8)  # type: ignore[arg-type]


def test_verification_sets(tmp_path: Path) -> None:
    (tmp_path / "broken.bin").write_bytes(b"no pickle")
    found = list(dataset.verification(["none.bin", "broken.bin", "more/broken.bin"], lambda name: tmp_path / name))
    assert [finding.state for finding in found] == ["fail"] * 3
    assert "cannot read it" in found[0].text
    assert "expected a pickle" in found[1].text
    assert "different names" in found[2].text


# ---- memory --------------------------------------------------------------------------------------------------------


def _config(**train: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(backbone="small", embedding_size=32),
        train=TrainConfig(batch_size=16, precision="fp32", **train),  # type: ignore[arg-type]
    )


def _plan(config: RunConfig, ranks: int = 1, *, classes: int = 1000, samples: int = 20_000) -> memory.Plan:
    return memory.plan(config, memory.sizes_of(np.arange(samples) % classes, classes, ranks), cuda=False)


def _bytes(plan: memory.Plan, name: str) -> int:
    return next(row.bytes for row in plan.rows if row.name == name)


def test_backbone_and_centres_are_counted_as_they_are() -> None:
    net = build_backbone("small", embedding_size=32)
    weights = sum(p.numel() for p in net.parameters())
    statistics = sum(buffer.nbytes for buffer in net.buffers())
    plan = _plan(_config())
    assert _bytes(plan, "backbone: weights and statistics") == 4 * weights + statistics
    assert _bytes(plan, "backbone: gradients") == _bytes(plan, "backbone: optimizer") == 4 * weights
    assert _bytes(plan, "class centres") == _bytes(plan, "class centres: optimizer") == 4 * 1000 * 32
    adam = _plan(
        replace(_config(), optim=OptimConfig(name="adamw"), head=HeadConfig(centre_dtype="bf16", subcentres=3))
    )
    assert _bytes(adam, "backbone: optimizer") == 8 * weights
    assert _bytes(adam, "class centres") == 2 * 3 * 1000 * 32
    assert _bytes(adam, "class centres: optimizer") == 2 * 2 * 3 * 1000 * 32 + 4 * 3 * 1000


def test_ranks_split_centres_and_bank_but_not_the_checkpoint() -> None:
    one, four = _plan(_config()), _plan(_config(), 4)
    for name in ("class centres", "refresh: copy of the bank"):
        assert _bytes(four, name) * 4 == _bytes(one, name)
    assert four.checkpoint == one.checkpoint
    plain = _plan(replace(_config(), clustering=ClusteringConfig(enabled=False)))
    assert plain.total("device") < one.total("device")
    assert not [row for row in plain.rows if "refresh" in row.name or "bank" in row.name]
    lower = _plan(replace(_config(), train=TrainConfig(batch_size=16, precision="bf16")))
    assert _bytes(lower, "backbone: weights in bf16") * 2 == _bytes(lower, "backbone: gradients")


def test_ranks_of_a_host_share_out_the_backbone() -> None:
    labels = np.arange(2000) % 100
    whole, cut = (
        memory.plan(RunConfig(model=ModelConfig(shard=shard)), memory.sizes_of(labels, 100, 8, 4), cuda=False)
        for shard in ("none", "host")
    )
    for name in ("backbone: gradients", "backbone: optimizer"):
        assert _bytes(cut, name) == _bytes(whole, name) / 4
    assert cut.checkpoint == whole.checkpoint
    copied = "copy of the rank's part of a checkpoint, kept"
    assert _bytes(whole, copied) - _bytes(cut, copied) > 0.7 * 2 * _bytes(whole, "backbone: gradients")


def test_the_rank_with_most_samples_counts() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] + [3])
    sizes = memory.sizes_of(labels, 4, 2)
    assert (sizes.own_classes, sizes.own_samples, sizes.samples) == (2, 12, 14)


def test_memory_that_does_not_suffice() -> None:
    plan = _plan(_config())
    wanted = plan.total("device")
    assert memory.device_memory(plan, [10 * wanted, wanted - 1]).state == "fail"
    assert memory.device_memory(plan, [wanted + 1]).state == "warn"
    assert memory.device_memory(plan, [2 * wanted]).state == "pass"
    on_host = plan.total("host")
    assert memory.host_memory(plan, 8 * on_host - 1, 8, cuda=True).state == "fail"
    assert memory.host_memory(plan, 8 * on_host + 1, 8, cuda=False).state == "fail", "on CPUs all of it is there"
    with pytest.raises(ConfigError, match=r"model\.backbone"):
        _plan(replace(_config(), model=ModelConfig(backbone="none")))


def test_counting_takes_no_memory_for_large_nets() -> None:
    plan = _plan(replace(_config(), model=ModelConfig(backbone="iresnet200")), classes=2_000_000, samples=2_000_000)
    assert _bytes(plan, "class centres") == 4 * 2_000_000 * 512


def test_settings_of_data_reach_the_checks() -> None:
    config = RunConfig(data=DataConfig(prefetch=8), model=ModelConfig(backbone="small", embedding_size=32))
    assert _bytes(_plan(config), "images decoded ahead") > 8 * 128 * 112 * 112 * 3
