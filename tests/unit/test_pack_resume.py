"""A pack that was stopped, in whatever way, goes on and ends with the same bytes; nobody is left behind by a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.__main__ import main
from data.making import partial, spill
from data.making.pack import SetWriter
from data.rec.records import RecordSet
from tests.image_cases import jpeg

ROOT = Path(__file__).parents[2]
STEP = 4
COUNT = 24
STOPPED = 18


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Eight identities of three images, the second one no image."""
    for number in range(COUNT):
        path = tmp_path / "people" / f"p{number // 3}" / f"{number % 3}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number) if number != 1 else b"no image")
    return tmp_path / "people"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A parquet file with labels in turn."""
    images = pa.array([jpeg(number) for number in range(COUNT)], pa.binary())
    pq.write_table(pa.table({"image": images, "label": np.arange(COUNT) % 5}), tmp_path / "a.parquet", 7)
    return tmp_path / "a.parquet"


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "STEP", STEP)
    monkeypatch.setattr(spill, "STEP", STEP)


def _pack(people: Path, out: Path, *more: str) -> int:
    return main(["pack", "folder", str(people), "--out", str(out), "--workers", "1", "--skip-bad", *more])


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Interrupts at an image from the next call on; 0: no more."""
    usual = SetWriter.write

    def at(image: int) -> None:
        def write(writer: SetWriter, label: int, content: bytes) -> None:
            if writer.count + 1 == image:
                raise KeyboardInterrupt
            usual(writer, label, content)

        monkeypatch.setattr(SetWriter, "write", write if image else usual)

    return at


@pytest.fixture
def stopped(
    tmp_path: Path, people: Path, interrupt: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> tuple[Path, dict[str, bytes]]:
    """A set that was interrupted, and the files of one that was not."""
    assert _pack(people, tmp_path / "whole") == 0
    interrupt(STOPPED)
    assert _pack(people, tmp_path / "set") == 130
    interrupt(0)
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; the same command goes on from there"
    names = sorted(os.listdir(tmp_path / "set"))
    assert names == [".identities.txt.part", ".pack.journal", ".property.part", ".train.idx.part", ".train.rec.part"]
    return tmp_path / "set", _files(tmp_path / "whole")


def test_it_goes_on_at_the_last_step(
    people: Path, stopped: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = stopped
    assert _pack(people, out) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"{out}: going on at image 16 of 24"]
    assert printed.out.endswith(", 1 left out\n")
    assert _files(out) == whole
    records = RecordSet.open(out)
    expected = [(number // 3, jpeg(number)) for number in range(COUNT) if number != 1]
    assert [records.image(sample) for sample in range(records.num_samples)] == expected


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def _garble(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [".pack.journal", ".train.rec.part", ".train.idx.part", ".property.part"])
def test_whatever_is_damaged_the_bytes_are_the_same(
    tmp_path: Path, people: Path, stopped: tuple[Path, dict[str, bytes]], name: str
) -> None:
    out, whole = stopped
    size = (out / name).stat().st_size
    places = sorted({0, 1, size // 7, size // 3, size // 2, size - 20, size - 1} & set(range(size)))
    for number, (damage, at) in enumerate((damage, at) for damage in (_cut, _garble) for at in places):
        shutil.copytree(out, tmp_path / f"set {number}")
        damage(tmp_path / f"set {number}" / name, at)
        assert _pack(people, tmp_path / f"set {number}") == 0
        assert _files(tmp_path / f"set {number}") == whole
    with (out / name).open("ab") as file:
        file.write(b"what a crash may leave" * 1000)
    (out / ".train.rec.part").unlink(missing_ok=name == ".train.idx.part")
    assert _pack(people, out) == 0
    assert _files(out) == whole


@pytest.mark.parametrize("other", ["another option", "bad images are no longer left out", "a file more"])
def test_another_job_starts_anew_and_says_so(
    tmp_path: Path,
    people: Path,
    stopped: tuple[Path, dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
    other: str,
) -> None:
    out, _ = stopped
    more: list[str] = []
    if other == "another option":
        more = ["--verification-identities", "3", "--pairs", "10"]
    elif other == "a file more":
        (people / "p7" / "9.jpg").write_bytes(jpeg(1))
    else:
        (people / "p0" / "1.jpg").write_bytes(jpeg(1))
    skip = [] if other.startswith("bad") else ["--skip-bad"]
    command = ["pack", "folder", str(people), "--workers", "1", *skip, *more, "--out"]
    assert main([*command, str(tmp_path / "fresh")]) == 0
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    assert capsys.readouterr().err.splitlines()[0].endswith("is of another pack, or damaged: starting anew")
    assert _files(out) == _files(tmp_path / "fresh")


def test_an_error_keeps_what_is_done(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (people / "p0" / "1.jpg").write_bytes(jpeg(1))
    (people / "p6" / "0.jpg").write_bytes(b"no image")
    command = ["pack", "folder", str(people), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert main(command) == 2
    (people / "p6" / "0.jpg").write_bytes(jpeg(18))
    capsys.readouterr()
    assert main(command) == 0
    assert "going on at image 16 of 24" in capsys.readouterr().err
    records = RecordSet.open(tmp_path / "set")
    assert [records.image(sample)[1] for sample in range(COUNT)] == [jpeg(number) for number in range(COUNT)]


def test_folders_made_for_nothing_are_removed(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    for out in (tmp_path / "made" / "set", tmp_path / "theirs"):
        assert main(["pack", "folder", str(people), "--out", str(out), "--workers", "1"]) == 2
        assert "--skip-bad, and pack goes on from here; once an image is added" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["people", "theirs"]
    assert not os.listdir(tmp_path / "theirs")


def test_two_packs_do_not_write_into_one_folder(
    people: Path, stopped: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = stopped
    with (out / ".pack.journal").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = _files(out)
        assert _pack(people, out) == 2
        assert "another process packs into this folder" in capsys.readouterr().err
        assert _files(out) == before
    assert _pack(people, out) == 0
    assert _files(out) == whole


def test_a_set_that_is_there_is_not_touched_by_what_was_stopped(
    people: Path, stopped: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = stopped
    (out / "train.rec").write_bytes(b"of somebody")
    before = _files(out)
    assert _pack(people, out) == 2
    assert "found train.rec" in capsys.readouterr().err
    assert _files(out) == before
    assert _pack(people, out, "--force") == 0
    assert _files(out) == whole


def test_setting_aside_goes_on_too(
    tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str) -> list[str]:
        return ["pack", "parquet", str(mixed), "--out", str(tmp_path / name), "--workers", "1"]

    assert main(command("whole")) == 0
    usual, left = spill.Cursor.at, [STOPPED]

    def at(cursor: spill.Cursor, *row: int) -> bytes | None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return usual(cursor, *row)

    monkeypatch.setattr(spill.Cursor, "at", at)
    assert main(command("set")) == 130
    for name in ("places", "0", "3", "journal"):
        for damage in (_cut, _garble):
            shutil.copytree(tmp_path / "set", tmp_path / f"{name} {damage.__name__}")
            path = tmp_path / f"{name} {damage.__name__}" / partial.SPILL / name
            damage(path, path.stat().st_size // 2)
            assert main(command(path.parents[1].name)) == 0
            assert _files(path.parents[1]) == _files(tmp_path / "whole")
            assert not path.parent.exists()
    capsys.readouterr()
    assert main(command("set")) == 0
    assert "going on to set images aside at image 16 of 24" in capsys.readouterr().err
    assert _files(tmp_path / "set") == _files(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "stride"), [("folder", "3"), ("parquet", "7")])
def test_killed_at_any_place(tmp_path: Path, people: Path, mixed: Path, kind: str, stride: str) -> None:
    """At every n-th write, sync, rename and removal, by SIGKILL; `tests/pack_killer.py` forks, which starts faster."""
    what = [str(people), "--skip-bad"] if kind == "folder" else [str(mixed)]
    what += ["--verification-identities", "2", "--pairs", "10"] if kind == "parquet" else []
    command = [kind, *what, "--out", "{}", "--workers", "1"]
    (tmp_path / "sets").mkdir()
    run = subprocess.run(
        [sys.executable, "-m", "tests.pack_killer", str(tmp_path / "sets"), stride, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = run.stdout.splitlines() or [run.stderr]
    assert int(line.removesuffix(" places")) > 50


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_command(tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "set"
    command = [*("-m", "data", "pack", "synthetic", "--out"), str(out), "--identities", "3000", "--workers", "2"]
    usual = signal.signal(sent, signal.default_int_handler) if sent != signal.SIGKILL else None
    run = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if usual is not None:
        signal.signal(sent, usual)  # what is ignored, as in a shell's background, is inherited
    _wait(lambda: (out / ".train.rec.part").exists() and (out / ".train.rec.part").stat().st_size > 0)
    children = _children(run.pid)
    assert len(children) >= 2
    run.send_signal(sent)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == (-sent if sent == signal.SIGKILL else 130)
    assert sent == signal.SIGKILL or errors.splitlines()[-1].startswith("error: interrupted; ")
    _wait(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
    assert not out.exists() or not [name for name in os.listdir(out) if not name.startswith(".")]


def _wait(until: Callable[[], bool]) -> None:
    for _ in range(600):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come within 30 seconds")
