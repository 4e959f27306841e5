"""Everything that can be wrong with a user's input: one clear line, a non-zero exit, no traceback."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.rec.header import pack, unpack
from data.rec.recordio import RecordReader, RecordWriter
from data.verification_bin import read_bin, write_bin
from tests.integration.conftest import Run, call

BAD_JPEGS = (5, 6, 50)


def _copy(packed: Path, to: Path) -> Path:
    shutil.copytree(packed, to)
    return to


def _one_line(done: object, *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]  # type: ignore[attr-defined]
    assert done.returncode != 0  # type: ignore[attr-defined]
    assert len(errors) == 1, done.stderr  # type: ignore[attr-defined]
    for part in parts:
        assert part in errors[0]
    # With torchrun, its own report of the failed ranks follows, with a traceback of torchrun itself.
    assert 'train_dist.py", line' not in done.stderr, "no traceback of ours"  # type: ignore[attr-defined]


def test_missing_rec(train_here: Run, tmp_path: Path) -> None:
    _one_line(train_here(data=tmp_path / "nowhere"), "nowhere")


def test_no_data_path(train_here: Run) -> None:
    _one_line(train_here("data.path=''"), "data.path")


def test_idx_of_another_file(train_here: Run, packed: Path, tmp_path: Path) -> None:
    data = _copy(packed, tmp_path / "data")
    lines = (data / "train.idx").read_text().splitlines()
    (data / "train.idx").write_text("".join(f"{line.split()[0]}\t{int(line.split()[1]) + 8}\n" for line in lines))
    _one_line(train_here(data=data), "train", "python -m data index")


def test_truncated_rec(train_here: Run, packed: Path, tmp_path: Path) -> None:
    data = _copy(packed, tmp_path / "data")
    os.truncate(data / "train.rec", (data / "train.rec").stat().st_size // 2)
    _one_line(train_here(data=data), "train.rec")


def test_property_that_disagrees(train_here: Run, packed: Path, tmp_path: Path) -> None:
    data = _copy(packed, tmp_path / "data")
    (data / "property").write_text("25,112,112\n")
    _one_line(train_here(data=data), "property", "25", "24")


def test_label_beyond_the_classes(train_here: Run, packed: Path, tmp_path: Path) -> None:
    data = _copy(packed, tmp_path / "data")
    offset = int((data / "train.idx").read_text().splitlines()[1].split("\t")[1])
    blob = bytearray((data / "train.rec").read_bytes())
    struct.pack_into("<f", blob, offset + 8 + 4, 99.0)  # record head 8 bytes, then flag, then the label
    (data / "train.rec").write_bytes(blob)
    _one_line(train_here(data=data), "99")


@pytest.mark.parametrize("ranks", [1, 2])
def test_unknown_setting(command: Callable[..., list[str]], ranks: int) -> None:
    """Ranks have not met then: torchrun ends the others before they say it too."""
    _one_line(call(*command(ranks, "train.epoch=3")), "did you mean train.epochs?")


def test_cuda_asked_for_and_absent(train_here: Run) -> None:
    _one_line(train_here("train.device=cuda"), "cuda was asked for", "train.device=cpu")


def test_batch_too_small(train_here: Run) -> None:
    _one_line(train_here("train.batch_size=1"), "at least 2")


def test_batch_larger_than_the_set(train_here: Run) -> None:
    _one_line(train_here("train.batch_size=1000"), "192", "1000")


def test_unknown_backbone(train_here: Run) -> None:
    _one_line(train_here("model.backbone=iresnet51"), "iresnet50")


def test_missing_verification_set(train_here: Run) -> None:
    _one_line(train_here("eval.sets=[lfw.bin]"), "lfw.bin")


def test_verification_set_with_pairs_of_one_kind(train_here: Run, packed: Path, tmp_path: Path) -> None:
    images = read_bin(packed / "verification.bin").images
    for same in ([True] * 20, [True, False] * 4):
        write_bin(tmp_path / "pairs.bin", images[: 2 * len(same)], same)
        _one_line(train_here(f"eval.sets=[{tmp_path / 'pairs.bin'}]"), "pairs.bin: expected at least 10 pairs")


def test_verification_sets_of_one_name(train_here: Run, packed: Path) -> None:
    _one_line(train_here(f"eval.sets=[verification.bin,{packed / 'verification.bin'}]"), "eval.sets", "different names")


def test_image_that_does_not_decode_in_a_verification_set(train: Run, packed: Path, tmp_path: Path) -> None:
    images, same = read_bin(packed / "verification.bin")
    write_bin(tmp_path / "pairs.bin", [*images[:6], images[6][:200], *images[7:]], same)
    _one_line(train(2, f"eval.sets=[{tmp_path / 'pairs.bin'}]"), "pairs: image 6 of 80")


def test_images_of_another_size(train_here: Run, packed: Path, tmp_path: Path) -> None:
    data = _copy(packed, tmp_path / "data")
    (data / "property").write_text("24,64,64\n")
    _one_line(train_here(data=data), "expected images of 112x112", "64x64", "property")


def test_unwritable_output(train_here: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    _one_line(train_here(f"train.output={tmp_path / 'file' / 'run'}"), "train.output: cannot write")


def _damage_jpegs(data: Path) -> None:
    """Rewrite the set with some images cut to half their bytes."""
    offsets = [int(line.split("\t")[1]) for line in (data / "train.idx").read_text().splitlines()]
    keys = [line.split("\t")[0] for line in (data / "train.idx").read_text().splitlines()]
    reader = RecordReader(data / "train.rec")
    order = np.argsort(offsets)
    with RecordWriter(data / "new.rec") as writer:
        moved = {}
        for position in order:
            header, image = unpack(reader.read_at(offsets[position]))
            body = bytes(image)
            if keys[position] in {str(number + 1) for number in BAD_JPEGS}:
                body = body[: len(body) // 2]
            moved[int(position)] = writer.write(pack(header, body))
    reader.close()
    (data / "new.rec").replace(data / "train.rec")
    (data / "train.idx").write_text("".join(f"{key}\t{moved[at]}\n" for at, key in enumerate(keys)))


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_images_that_do_not_decode_are_skipped_counted_and_limited(
    train: Run, packed: Path, tmp_path: Path, backend: str
) -> None:
    data = _copy(packed, tmp_path / "data")
    _damage_jpegs(data)
    settings = (f"data.backend={backend}", "train.epochs=1", "train.log_steps=8")
    fine = train(2, *settings, data=data, name="fine")
    assert fine.returncode == 0, fine.stderr
    assert f'"data/images_that_did_not_decode": {len(BAD_JPEGS)}.0' in (tmp_path / "fine/metrics.jsonl").read_text()
    for number in BAD_JPEGS:
        assert f"sample {number}" in fine.stderr, "each bad image is named"
    if backend == "dali":
        return  # the limit is the trainer's, whatever the loader
    limited = train(2, *settings, "data.max_bad_images=2", data=data, name="limited")
    _one_line(limited, "3 images did not decode", "data.max_bad_images allows 2")


def test_help_needs_no_data() -> None:
    done = call("train_dist.py", "--help")
    assert done.returncode == 0
    assert "--set SECTION.FIELD=VALUE" in done.stdout
