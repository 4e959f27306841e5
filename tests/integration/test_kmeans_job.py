"""`python -m clustering kmeans` as a user runs it: outputs, resuming bit for bit, interruptions, what is wrong."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from clustering import __main__ as command_line
from clustering.job import files
from clustering.job.job import Job
from clustering.job.state import JobState
from tests.integration.conftest import ROOT, call, environment

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows of 24 persons in two parts, float16 of any length, 3 of them zero; and the persons."""
    folder = tmp_path_factory.mktemp("embeddings")
    generator = np.random.default_rng(0)
    persons_N = np.arange(600) % 24
    centres = generator.standard_normal((24, 32))
    x_ND = (centres[persons_N] + 0.6 * generator.standard_normal((600, 32))) * generator.uniform(0.5, 9, (600, 1))
    x_ND[[5, 77, 599]] = 0
    (folder / "parts").mkdir()
    np.save(folder / "parts" / "part1.npy", x_ND[:450].astype(np.float16))
    np.save(folder / "parts" / "part02.npy", x_ND[450:].astype(np.float16))
    np.save(folder / "persons.npy", persons_N)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: spares the seconds of starting one."""

    def here(*arguments: object) -> subprocess.CompletedProcess[str]:
        threads = torch.get_num_threads()
        capsys.readouterr()
        try:
            code = command_line.main(["kmeans", "--device", "cpu", *map(str, arguments)])
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess([], code, printed.out, printed.err)

    return here


def _outputs(out: Path) -> tuple[Any, Any, Any]:
    told = json.loads(out.with_suffix(".json").read_text())
    return np.load(out), np.load(out.with_suffix(".assignments.npy")), told


def _same(one: Path, other: Path) -> bool:
    endings = (".npy", ".assignments.npy")
    return all(one.with_suffix(end).read_bytes() == other.with_suffix(end).read_bytes() for end in endings)


def _one_line(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]
    assert "Traceback" not in done.stderr


def test_outputs(run: Run, embeddings: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "centres.npy"
    done = run(embeddings / "parts", "--k", 24, "--out", out)
    assert done.returncode == 0, done.stderr
    centres_KD, index_N, told = _outputs(out)
    assert (centres_KD.dtype, centres_KD.shape, index_N.dtype, index_N.shape) == (
        np.float32,
        (24, 32),
        np.int32,
        (600,),
    )
    assert np.flatnonzero(index_N == -1).tolist() == [5, 77, 599]
    x_ND = np.concatenate([np.load(embeddings / "parts" / f"part{n}.npy") for n in ("1", "02")]).astype(np.float64)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True).clip(1e-9)
    cosine_NK = x_ND @ centres_KD.T.astype(np.float64)
    counted_N = index_N >= 0
    assert np.array_equal(cosine_NK.argmax(1)[counted_N], index_N[counted_N]), "nearest of the centres that are written"
    assert told["mean cosine"] == pytest.approx(cosine_NK.max(1)[counted_N].mean(), abs=1e-6)
    persons_N = np.load(embeddings / "persons.npy")[counted_N]
    assert len(set(zip(persons_N, index_N[counted_N], strict=True))) == 24, "merged and split until each has its own"
    assert (told["settings"]["zero rows"], told["empty clusters"]) == (3, 0)
    cosines = [step["mean_cosine"] for step in told["iterations"]]
    assert len(cosines) < 20
    assert all(later > earlier - 1e-6 for earlier, later in itertools.pairwise(cosines))
    assert "600 rows of 32 components, 3 of them zero and left out; 24 clusters" in done.stderr
    assert done.stderr.count("\n") == 1 + len(cosines), "a line each"
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "centres.assignments.npy",
        "centres.json",
        "centres.npy",
    ]


def test_ranks_end_with_the_same_bits(run: Run, embeddings: Path, tmp_path: Path) -> None:
    arguments = ("--k", "40", "--iterations", "6", "--tolerance", "0")
    assert run(embeddings / "parts", *arguments, "--out", tmp_path / "one.npy").returncode == 0
    done = call(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "clustering", "kmeans"),
        *(str(embeddings / "parts"), *arguments, "--out", str(tmp_path / "two.npy")),
    )
    assert done.returncode == 0, done.stderr
    assert _same(tmp_path / "one.npy", tmp_path / "two.npy")


def test_rows_that_do_not_fit_into_memory(
    run: Run, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (embeddings / "parts", "--k", 40, "--iterations", 4, "--seeding", "kmeans++")
    assert run(*arguments, "--out", tmp_path / "kept.npy").returncode == 0
    monkeypatch.setattr(files, "_free_memory", lambda device: 0)
    assert run(*arguments, "--out", tmp_path / "read.npy").returncode == 0
    assert _same(tmp_path / "kept.npy", tmp_path / "read.npy")


STARTS: list[tuple[object, ...]] = [
    ("--k", 40, "--seeding", "random"),
    ("--k", 40, "--seeding", "kmeans++", "--seed", 3),
    ("--k", 40, "--seeding", "kmeans-parallel", "--dtype", "bf16"),
    ("--k", 40, "--batch", 100, "--iterations", 8),
    ("--labels", "persons.npy"),
    ("--k", 30, "--labels", "persons.npy", "--in-memory"),
    ("--start", "start.npy"),
]


@pytest.mark.parametrize("start", STARTS, ids=lambda start: " ".join(map(str, start)))
def test_a_job_ended_after_any_iteration_goes_on_to_the_same_bits(
    run: Run, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: tuple[object, ...]
) -> None:
    monkeypatch.chdir(embeddings)
    np.save(embeddings / "start.npy", np.load(embeddings / "parts" / "part1.npy")[100:140])
    whole, parts = tmp_path / "whole.npy", tmp_path / "parts.npy"
    done = run("parts", *start, "--out", whole, "--iterations", 6)
    assert done.returncode == 0, done.stderr
    write, ended = JobState.write, 0

    def write_and_end(self: JobState, number: int, *arguments: Any) -> None:
        write(self, number, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    monkeypatch.setattr(JobState, "write", write_and_end)
    while (done := run("parts", *start, "--out", parts, "--iterations", 6)).returncode == 128 + signal.SIGTERM:
        _one_line(done, "interrupted", "parts.npy.part", code=143)
        ended += 1
        assert ended < 10
    assert done.returncode == 0, done.stderr
    assert ended >= 2
    assert _same(whole, parts)
    keep = ("mean cosine", "empty clusters", "settings")
    assert [_outputs(whole)[2][key] for key in keep] == [_outputs(parts)[2][key] for key in keep]
    assert not parts.with_name("parts.npy.part").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_from_outside(embeddings: Path, tmp_path: Path, number: int) -> None:
    command = ("-m", "clustering", "kmeans", "parts", "--k", "300", "--iterations", "100000", "--tolerance", "0")
    with subprocess.Popen(
        [sys.executable, *command, "--batch", "300", "--out", str(tmp_path / "c.npy")],
        cwd=embeddings,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(number)
        rest = process.stderr.read()
    assert "iteration 2" in lines[2]
    _one_line(subprocess.CompletedProcess([], process.returncode, "", rest), "interrupted", code=128 + number)
    assert (tmp_path / "c.npy.part" / "state.json").exists()


def test_killed_in_an_iteration(run: Run, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, twice, at whatever moment that is; the same command goes on to the same bits."""
    monkeypatch.chdir(embeddings)
    rest = ("parts", "--k", "300", "--iterations", "40", "--tolerance", "0", "--batch", "300")
    assert run(*rest, "--out", tmp_path / "whole.npy").returncode == 0
    command = [sys.executable, "-m", "clustering", "kmeans", *rest, "--out", str(tmp_path / "parts.npy")]
    for iteration in (2, 9):
        with subprocess.Popen(
            command, cwd=embeddings, env={**environment(), "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if f"iteration {iteration}" in line:
                    process.kill()
        assert process.returncode == -signal.SIGKILL
    done = run(*rest, "--out", tmp_path / "parts.npy")
    assert done.returncode == 0, done.stderr
    assert _same(tmp_path / "whole.npy", tmp_path / "parts.npy")


def test_other_settings_or_data_do_not_go_on(
    run: Run, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.npy"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_full", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))
        _one_line(run(embeddings / "parts", "--k", 24, "--out", out), "interrupted", code=130)
    _one_line(
        run(embeddings / "parts", "--k", 25, "--out", out), "unfinished job with k 24, this one has 25", "--force"
    )
    _one_line(run(embeddings / "parts" / "part1.npy", "--k", 24, "--out", out), "unfinished job", "--force")
    np.save(tmp_path / "start.npy", np.eye(24, 32, dtype=np.float32))
    _one_line(run(embeddings / "parts", "--start", tmp_path / "start.npy", "--out", out), "unfinished job")
    done = run(embeddings / "parts", "--k", 25, "--out", out, "--force")
    assert done.returncode == 0, done.stderr
    _one_line(run(embeddings / "parts", "--k", 25, "--out", out), "expected no file there", "--force")


def test_arguments_that_do_not_fit(run: Run, embeddings: Path, tmp_path: Path) -> None:
    source, out = embeddings / "parts", ("--out", tmp_path / "c.npy")
    _one_line(run(source, *out), "expected --k")
    _one_line(run(source, "--k", 0, *out), "--k", "from 1")
    _one_line(run(source, "--k", "x", *out), "--k")
    _one_line(run(source, "--k", 5, "--tolerance", "nan", *out), "--tolerance")
    _one_line(run(source, "--k", 5, "--seeding", "random", "--labels", "x.npy", *out), "one of --seeding")
    _one_line(run(source, "--k", 5, "--out", tmp_path / "c.txt"), "ends in .npy")
    _one_line(run(source, "--k", 5, "--out", source / "c.npy"), "would be read as embeddings")
    _one_line(run(source, "--k", 598, *out), "--k 598", "got 597")
    _one_line(run(tmp_path / "none.npy", "--k", 5, *out), "none.npy: cannot read it")
    (tmp_path / "empty").mkdir()
    _one_line(run(tmp_path / "empty", "--k", 5, *out), "expected .npy files in this folder")


def test_files_that_do_not_fit(run: Run, embeddings: Path, tmp_path: Path) -> None:
    source, out, path = embeddings / "parts", ("--out", tmp_path / "c.npy"), tmp_path / "x.npy"

    def saved(array: Any) -> Path:
        np.save(path, array)
        return path

    _one_line(run(saved(np.zeros(9, np.float32)), "--k", 2, *out), "expected float16, float32 or float64 of shape")
    _one_line(run(saved(np.array([[1, 2], [np.nan, 1]])), "--k", 1, *out), "1 of 2 rows", "not finite: 1 ")
    _one_line(run(saved(np.zeros((3, 2))), "--k", 1, *out), "--k 1", "got 0 of these")
    _one_line(run(saved(np.ones((9, 2))), "--k", 2, *out), "--k 2", "got 1 of these")
    _one_line(
        run(source, "--start", saved(np.eye(4)), *out), "x.npy: expected float32 centres (K, 32), got float64 (4, 4)"
    )
    _one_line(run(source, "--k", 5, "--start", saved(np.eye(4, 32)), *out), "(4, 32)")
    _one_line(run(source, "--start", saved(np.full((4, 32), np.inf)), *out), "4 of 4 centres", "not finite")
    _one_line(run(source, "--labels", saved(np.zeros(9, np.int64)), *out), "each of the 600 rows", "(9,)")
    _one_line(run(source, "--labels", saved(np.zeros(600)), *out), "float64")
    _one_line(run(source, "--labels", saved(np.full(600, -2)), *out), "expected classes from 0")
    _one_line(run(source, "--k", 3, "--labels", embeddings / "persons.npy", *out), "at least as many", "24 classes")


@pytest.mark.parametrize(("rows", "dim", "clusters"), [(1, 7, 1), (9, 1, 2), (7, 3, 7), (123, 507, 1)])
def test_small_sizes(run: Run, tmp_path: Path, rows: int, dim: int, clusters: int) -> None:
    x_ND = np.random.default_rng(1).standard_normal((rows, dim)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_ND)
    done = run(tmp_path / "x.npy", "--k", clusters, "--out", tmp_path / "c.npy")
    assert done.returncode == 0, done.stderr
    centres_KD, index_N, _ = _outputs(tmp_path / "c.npy")
    assert len(set(index_N.tolist())) == clusters
    assert np.allclose(np.linalg.norm(centres_KD, axis=1), 1, atol=1e-6)


def test_a_full_disk(run: Run, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assignments find no room: one line, nothing half-written, and the job goes on once there is."""
    out = tmp_path / "c.npy"
    out.write_bytes(b"old")
    fsync = os.fsync

    def no_room(file: int) -> None:
        if ".c.assignments.npy." in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        done = run(embeddings / "parts", "--k", 24, "--out", out, "--force")
    _one_line(done, "c.assignments.npy: cannot write it (No space left on device): make room")
    assert out.read_bytes() == b"old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    out.unlink()
    assert run(embeddings / "parts", "--k", 24, "--out", out).returncode == 0
    assert len(_outputs(out)[1]) == 600
