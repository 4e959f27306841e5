"""`python -m training checkpoint` on what a run has written; checkpoints in an object store, and on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.embed.records import load_backbone
from tests.conftest import STORE_KEYS
from tests.integration.conftest import Run
from tests.integration.test_resume import STEPS
from training.__main__ import main
from training.checkpoint import Saved, place_of

Said = pytest.CaptureFixture[str]


@pytest.fixture
def run(train: Run, tmp_path: Path) -> Path:
    """The output of two ranks, stopped amid an epoch and a refresh."""
    done = train(2, "train.stop_after_steps=11", "head.centre_dtype=bf16")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_all_of_it_on_one_run(run: Path, tmp_path: Path, capsys: Said) -> None:
    folder = run / "checkpoints" / "step_000000011"
    for where in (run, run / "checkpoints", folder):
        assert main(["checkpoint", "inspect", str(where), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["newest"] == folder.name
        assert told["tensors"]["head.weight"] == {"dtype": "BF16", "shape": [24, 16], "pieces": 2}
        assert told["values"]["settings"]["head"]["scale"] == 16
    assert main(["checkpoint", "inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "step_000000011" in shown
    assert "head.weight" in shown

    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == ["step_000000008: whole", "step_000000011: whole"]

    saved = Saved(place_of(str(run / "checkpoints")), folder.name)
    for name in ("weights.pt", "weights.safetensors"):
        assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / name)]) == 0
    load_backbone("small", embedding_size=16, weights=tmp_path / "weights.pt")
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(tensor, saved.read(f"backbone.{name}"))
    centres = ["checkpoint", "export", str(run), "--what", "centres", "--out"]
    assert main([*centres, str(tmp_path / "centres.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "centres.npy"), saved.read("head.weight").float().numpy())

    assert main(["checkpoint", "reshard", str(run), "--ranks", "5", "--out", str(tmp_path / "five")]) == 0
    five = Saved(place_of(str(tmp_path / "five")), folder.name)
    assert len(five.manifest.parts) == 5
    assert five.values == saved.values
    for name in saved.names:
        assert torch.equal(five.read(name), saved.read(name)), name

    part = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(part.read_bytes())
    content[-7] ^= 16
    part.write_bytes(content)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"{part}: bytes 0 to {len(content) - 1} are not what was written" in said
    assert "step_000000011: damaged, 1 finding(s)" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere"], "expected the output of a run, its checkpoints, or one of them"),
        (["verify", "step_000000001"], "found no checkpoint"),
        (["export", "{run}", "--out", "x.txt"], "expected a name that ends with .pt or .safetensors"),
        (["export", "{run}", "--out", "/proc/x.pt"], "cannot write it"),
        (["reshard", "{run}", "--ranks", "2", "--out", "{run}/checkpoints"], "expected no checkpoint there"),
        (["reshard", "{run}", "--ranks", "0", "--out", "x"], "expected a whole number from 1 on"),
        (["reshard", "{run}", "--ranks", "2", "--out", "/proc/x"], "/proc/x"),
        (["inspect", "nosuch://x/y"], "expected a driver for such addresses"),
    ],
)
def test_bad_arguments_are_one_line(
    train_here: Run, tmp_path: Path, arguments: list[str], said: str, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here("train.stop_after_steps=3").returncode == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    try:
        code = main(["checkpoint", *(part.format(run=tmp_path / "run") for part in arguments)])
    except SystemExit as left:
        code = int(str(left.code))
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert said in told


def test_a_malicious_checkpoint_runs_no_code_and_is_refused(train: Run, train_here: Run, tmp_path: Path) -> None:
    """A pickle in the place of each file; nothing here unpickles."""
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {canary}",))

    assert train_here("train.stop_after_steps=3").returncode == 0
    folder = tmp_path / "run" / "checkpoints" / "step_000000003"
    torch.save({"x": Attack()}, tmp_path / "attack.pt")
    for path in folder.iterdir():
        path.write_bytes((tmp_path / "attack.pt").read_bytes())
    refused = train(1)
    assert refused.returncode == 2
    assert "none of its 1 checkpoints is whole" in refused.stderr
    assert not canary.exists()


def test_checkpoints_in_an_object_store(
    bucket: Any, endpoint: str, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """Two ranks write them, a damaged one is fallen back from, and the run ends as one with local ones."""
    files, name = bucket
    for key, value in {**STORE_KEYS, "FSSPEC_S3_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(key, value)
    there = f"train.checkpoints=s3://{name}/runs/a"
    few = ("train.epochs=2", "train.checkpoint_steps=4")
    assert train(2, *few, name="whole").returncode == 0
    first = train(2, *few, there, "train.stop_after_steps=12", name="far")
    assert first.returncode == 0, first.stderr
    assert main(["checkpoint", "verify", f"s3://{name}/runs/a"]) == 0
    assert capsys.readouterr().out.splitlines() == ["step_000000008: whole", "step_000000012: whole"]
    damaged = next(path for path in files.ls(f"{name}/runs/a/step_000000012") if path.endswith(".safetensors"))
    files.pipe_file(damaged, b"x" * files.info(damaged)["size"])
    rest = train(2, *few, there, name="far")
    assert rest.returncode == 0, rest.stderr
    assert "resumed at step 8" in rest.stderr
    assert "are not what was written" in rest.stderr
    one, other = (torch.load(tmp_path / run / "backbone.pt", weights_only=True) for run in ("whole", "far"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "far" / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a megabyte at first."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(train: Run, small_disk: Path, tmp_path: Path) -> None:
    """The first fits, the next two do not: the run says so, goes on once, ends, and goes on when there is room."""
    many = ("train.checkpoint_steps=4", f"train.checkpoints={small_disk}")
    whole = train(1, name="whole")
    assert whole.returncode == 0, whole.stderr
    last = Saved(place_of(str(tmp_path / "whole" / "checkpoints")), f"step_{STEPS:09d}")
    _resize(small_disk, sum(part.size for part in last.manifest.parts.values()) * 3 // 2)
    ended = train(1, *many, "train.stop_after_steps=12", name="parts")
    assert ended.returncode == 2, ended.stderr
    assert "cannot write the checkpoint of step 8" in ended.stderr.partition("training goes on")[0]
    assert "error: cannot write the checkpoint of step 12" in ended.stderr
    assert "No space left on device" in ended.stderr
    assert (small_disk / "latest").read_text() == "step_000000004\n"
    _resize(small_disk, 100 << 20)
    rest = train(1, *many, name="parts")
    assert rest.returncode == 0, rest.stderr
    assert "resumed at step 4" in rest.stderr
    one, other = (torch.load(tmp_path / name / "backbone.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert Saved(place_of(str(small_disk)), f"step_{STEPS:09d}").manifest.step == STEPS
