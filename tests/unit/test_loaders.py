"""Both loaders: the same batches, resumable, for any number of ranks, bad images included, nothing left behind."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.augment import AugmentConfig
from data.errors import DataError
from data.loading.base_loader import Draft, Planned
from data.loading.batch import Batch, Loader
from data.loading.cpu_loader import CpuLoader
from data.loading.dali import DaliLoader, DaliUnavailableError
from data.loading.decode import decode_image
from data.loading.loader import build_loader
from data.loading.transforms import flips
from data.rec.records import RecordSet
from tests.image_cases import SIZE, MemorySet, damaged_images, jpeg, odd_images
from tests.record_files import image_record, write_set

CPU = torch.device("cpu")
BACKENDS = ["cpu", "dali"]
GOOD = MemorySet([jpeg(seed, quality=60 + seed % 40, chroma=["420", "422", "444"][seed % 3]) for seed in range(53)])


def _loader(records: Any = GOOD, backend: Any = "cpu", **changes: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 3, "device": CPU, "threads": 2}
    settings |= {"prefetch": 2, "flip": True} | changes
    return build_loader(records, backend=backend, **settings)


def _same(ours: list[Batch], theirs: list[Batch], tolerance: int = 0) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.labels.equal(b.labels)
        assert a.sample_ids.equal(b.sample_ids)
        assert (a.images.int() - b.images.int()).abs().max() <= tolerance
        assert a.images.stride() == b.images.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_what_the_records_hold(backend: str) -> None:
    loader = _loader(backend=backend)
    assert loader.backend == backend
    assert loader.steps_per_epoch == 6
    batches = list(loader.epoch(1))
    seen = torch.cat([batch.sample_ids for batch in batches])
    assert len(batches) == 6
    assert len(seen.unique()) == 48
    mirrored = flips(seen.numpy(), seed=3, epoch=1)
    assert 10 < mirrored.sum() < 38
    for batch in batches:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, *SIZE))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
        assert batch.labels.equal(batch.sample_ids % 10)
    for image, sample, flip in zip(torch.cat([b.images for b in batches]), seen.tolist(), mirrored, strict=True):
        expected = decode_image(GOOD.images[sample], SIZE)[:, :: -1 if flip else 1]
        assert (image.permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_flips(backend: str) -> None:
    batch = next(_loader(backend=backend, flip=False).epoch(0))
    for image, sample in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        assert (image.permute(1, 2, 0).numpy() == decode_image(GOOD.images[sample], SIZE)).all()


@pytest.mark.parametrize("size", [(112, 96), (17, 33)])
def test_other_sizes(size: tuple[int, int]) -> None:
    records = MemorySet([jpeg(seed, size=size) for seed in range(9)], size)
    _same(list(_loader(records, batch_size=3).epoch(0)), list(_loader(records, "dali", batch_size=3).epoch(0)), 2)


@pytest.mark.parametrize("chroma", ["444", "422", "420", "440", "411", "Gray"])
def test_both_decoders_agree_on_every_chroma(chroma: str) -> None:
    records = MemorySet([jpeg(i, quality=q, chroma=chroma) for i in range(4) for q in (10, 50, 75, 90, 95, 100)])
    _same(*(list(_loader(records, backend, batch_size=24).epoch(0)) for backend in BACKENDS), tolerance=2)


def test_both_loaders_agree_on_odd_and_damaged_images(caplog: pytest.LogCaptureFixture) -> None:
    damaged = [encoded for encoded, _ in damaged_images().values()]
    records = MemorySet([*damaged, *odd_images().values(), *GOOD.images[:33]])
    epochs, logs = [], []
    for backend in BACKENDS:
        caplog.clear()
        loader = _loader(records, backend, batch_size=6)
        epochs.append([batch for epoch in range(3) for batch in loader.epoch(epoch)])
        logs.append([record.getMessage() for record in caplog.records])
    _same(*epochs, tolerance=2)
    assert logs[0] == logs[1]
    seen = torch.cat([batch.sample_ids for batch in epochs[0]])
    labels = torch.cat([batch.labels for batch in epochs[0]])
    bad = seen < len(damaged)
    assert (labels[bad] == -1).all()
    assert (labels[~bad] == seen[~bad] % 10).all()
    named = sorted(int(line.split()[1]) for line in logs[0])
    assert named == seen[bad].unique().tolist(), "each bad image is named, once in three epochs"


def test_dali_decodes_whatever_passes_the_check_as_we_do(caplog: pytest.LogCaptureFixture) -> None:
    """Images with random damage: about half is refused, by both; DALI takes the rest without failing."""
    rng = np.random.default_rng(0)
    damaged = []
    for good in [*odd_images().values(), *GOOD.images[:12]] * 8:
        encoded = bytearray(good)
        encoded[rng.integers(len(encoded) // 4, len(encoded))] ^= int(rng.integers(1, 256))
        damaged.append(bytes(encoded))
    records = MemorySet(damaged)
    ours, theirs = (list(_loader(records, backend, batch_size=16).epoch(0)) for backend in BACKENDS)
    _same(ours, theirs, tolerance=2)
    refused = sum(int((batch.labels < 0).sum()) for batch in ours)
    assert len(damaged) // 5 < refused < len(damaged) * 4 // 5
    assert "DALI failed" not in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_shows_the_next_good_image_with_its_flip(backend: str) -> None:
    images = list(GOOD.images[:8])
    (ids,) = (batch.sample_ids.tolist() for batch in _loader(MemorySet(images)).epoch(0))
    for row in (2, 3, 7):
        images[ids[row]] = b"damaged"
    (batch,) = _loader(MemorySet(images), backend).epoch(0)
    assert batch.sample_ids.tolist() == ids
    assert (batch.labels == -1).nonzero().ravel().tolist() == [2, 3, 7]
    for row, donor in {2: 4, 3: 4, 7: 0}.items():
        assert batch.images[row].equal(batch.images[donor])
    clean = next(_loader(MemorySet(GOOD.images[:8])).epoch(0))
    for row in (0, 1, 4, 5, 6):
        assert batch.images[row].equal(clean.images[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_a_good_image_is_black(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    (batch,) = _loader(MemorySet([b"no"] * 8), backend).epoch(0)
    assert not batch.images.any()
    assert (batch.labels == -1).all()
    assert len(caplog.records) == 8


def test_donors() -> None:
    draft = Draft(Planned(np.arange(5), np.zeros(5, np.bool_), None), pinned=False)
    for faults, expected in [([], [0, 1, 2, 3, 4]), ([0, 4], [1, 1, 2, 3, 1]), ([0, 1, 3, 4], [2] * 5)]:
        draft.faults = dict.fromkeys(faults, "")
        donors_B = draft.donors()
        assert donors_B is not None
        assert donors_B.tolist() == expected
    draft.faults = dict.fromkeys(range(5), "")
    assert draft.donors() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_gives_the_rest_of_the_epoch(backend: str) -> None:
    whole = list(_loader(backend=backend).epoch(2))
    for start in (0, 1, 4, 6):
        _same(list(_loader(backend=backend).epoch(2, start=8 * start)), whole[start:])
    for start, epoch in ((-1, 0), (54, 0), (0, -1)):
        with pytest.raises(DataError, match=r"0 to 53 images of the epoch|an epoch of 0 or more"):
            _loader(backend=backend).epoch(epoch, start=start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_slice_one_global_batch(backend: str) -> None:
    whole = list(_loader(backend=backend).epoch(0))
    for world_size in (2, 4):
        parts = [
            list(_loader(backend=backend, rank=rank, world_size=world_size, batch_size=8 // world_size).epoch(0))
            for rank in range(world_size)
        ]
        joined = [
            Batch(*(torch.cat([getattr(b, f) for b in step]) for f in ("images", "labels", "sample_ids")))
            for step in zip(*parts, strict=True)
        ]
        for a, b in zip(joined, whole, strict=True):
            assert a.images.equal(b.images)
            assert a.labels.equal(b.labels)
            assert a.sample_ids.equal(b.sample_ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_prefetch_change_nothing(backend: str) -> None:
    first = list(_loader(backend=backend, threads=1, prefetch=1).epoch(0))
    _same(list(_loader(backend=backend, threads=4, prefetch=9).epoch(0)), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_consumers(backend: str) -> None:
    """No buffer is used twice: an early batch is unchanged after the last, and may be written to."""
    stream = _loader(backend=backend).epoch(0)
    first = next(stream)
    copy = first.images.clone()
    for batch in stream:
        batch.images.zero_()
    assert first.images.equal(copy)


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of the process as Linux does")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_thread_outlives_its_epoch(backend: str) -> None:
    list(_loader(backend=backend).epoch(0))  # whatever libraries start once
    gc.collect()
    before = _tasks()
    loader = _loader(backend=backend, threads=3)
    early = loader.epoch(0)
    next(early)
    early.close()
    left = loader.epoch(0)
    next(left)
    assert _tasks() > before
    loader.close()
    with pytest.raises(StopIteration):
        next(left)
    list(loader.epoch(0))
    deadline = time.monotonic() + 5  # the kernel may list a joined thread a moment longer
    while _tasks() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _tasks() == before, [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("backend", "dali_holds"), [("cpu", 0), ("dali", 2)])
def test_reads_stay_within_the_prefetch(backend: str, dali_holds: int) -> None:
    records = MemorySet(GOOD.images)
    stream = _loader(records, backend, batch_size=2, prefetch=3).epoch(0)
    for step in range(1, 10):
        next(stream)
        time.sleep(0.01)
        assert records.reads <= 2 * (step + 3 + dali_holds)
    stream.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_errors_are_raised_in_their_batchs_turn(backend: str) -> None:
    class Broken(MemorySet):
        def image(self, sample: int) -> tuple[int, memoryview]:
            if sample == broken:
                raise DataError("label 99 of 10 classes")
            return super().image(sample)

    broken = int(list(_loader().epoch(0))[3].sample_ids[5])
    stream = _loader(Broken(GOOD.images), backend).epoch(0)
    _same([next(stream) for _ in range(3)], list(_loader().epoch(0))[:3])
    with pytest.raises(DataError, match="label 99 of 10 classes"):
        next(stream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_a_record_file(backend: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image_record(i, [i % 10], GOOD.images[i]) for i in range(20)], classes=10)
    records = RecordSet.open(folder)
    _same(list(_loader(records, backend).epoch(0)), list(_loader(MemorySet(GOOD.images[:20])).epoch(0)))
    records.close()


def test_what_dali_fails_on_is_decoded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DALI fails twice, at the first batch and in the middle: the epoch is the same, and the log says so."""
    loader = _loader(backend="dali")
    assert isinstance(loader, DaliLoader)
    run, calls = loader._run, iter(range(100))

    def failing(pipeline: Any) -> torch.Tensor:
        images = run(pipeline)
        if next(calls) in (0, 2):
            raise RuntimeError("Critical error in pipeline:\nno such image")
        return images

    monkeypatch.setattr(loader, "_run", failing)
    _same(list(loader.epoch(0)), list(_loader().epoch(0)))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert all("DALI failed" in line and "no such image" in line for line in warnings)


def test_dali_itself_fails_on_what_the_check_would_have_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the check switched off a cut JPEG ends DALI's pipeline for real; the CPU then refuses it by name."""
    monkeypatch.setattr("data.loading.dali.check_image", lambda encoded, size: None)
    images = list(GOOD.images[:16])
    images[5] = images[5][: len(images[5]) // 2]
    with pytest.raises(DataError, match="damaged JPEG: Premature end"):
        list(_loader(MemorySet(images), "dali").epoch(0))
    assert "DALI failed" in caplog.text


def test_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(_loader(backend="auto"), CpuLoader)
    assert "decodes faster than DALI" in caplog.text
    gpu, blurred = torch.device("cuda", 0), AugmentConfig(blur=0.1)
    assert isinstance(_loader(backend="auto", augment=blurred), CpuLoader)
    assert isinstance(_loader(backend="auto", device=gpu), CpuLoader)
    assert isinstance(_loader(backend="auto", device=gpu, augment=blurred), DaliLoader)
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)  # an import of it now fails
    with pytest.raises(DaliUnavailableError, match=r"install nvidia-dali-cuda130 .* or use data.backend=cpu"):
        _loader(backend="dali")
    assert isinstance(_loader(backend="auto", device=gpu, augment=blurred), CpuLoader)
    assert "DALI does not load" in caplog.text
    assert isinstance(_loader(backend="cpu", device=gpu), CpuLoader)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    damaged = [encoded for encoded, _ in damaged_images().values()]
    records = MemorySet([*damaged, *GOOD.images])
    batches = list(_loader(records, backend, device=torch.device("cuda", 0)).epoch(0))
    assert all(t.device.type == "cuda" for batch in batches for t in (batch.images, batch.labels, batch.sample_ids))
    on_host = [Batch(b.images.cpu(), b.labels.cpu(), b.sample_ids.cpu()) for b in batches]
    _same(on_host, list(_loader(records).epoch(0)), tolerance=3)  # nvJPEG on an H200: over 2 in 1 number of 10^5
