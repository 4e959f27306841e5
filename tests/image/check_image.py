"""`make test-image`: the CPU image, built here and trained in. Not part of `make test`, as it takes some ten minutes.

The base is a Debian root file system from the machine's package mirror, as no registry may be reached; everything else
is `make image`. Containers run under runc with what docker/k8s asks for: user 10001, no capability, a read-only root
file system, writable only /runs, /tmp and /dev/shm, and the entrypoint as PID 1.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.image.containers import Container, Mounted, image_settings
from tests.image.pip_options import pip_options

ROOT = Path(__file__).parents[2]
BASE, NAME = "localhost/clusterface-base", "localhost/clusterface:test"
USER = 10001


class Image(NamedTuple):
    root: Path
    """Its files, mounted."""
    settings: dict[str, Any]
    said: str
    """What `make image` printed."""


def _call(*command: str, **environment: str) -> str:
    done = subprocess.run(
        ["env", *(f"{key}={value}" for key, value in environment.items()), *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("build")
    print(_call("sh", str(ROOT / "tests/image/make_base.sh"), BASE))
    options = ["--network=host", *pip_options(folder)]
    said = _call(
        *("make", "image", "VARIANT=cpu", f"IMAGE={NAME}", f"IMAGE_BASE={BASE}", f"IMAGE_OPTIONS={' '.join(options)}"),
        BUILDAH_ISOLATION="chroot",
    )
    with Mounted(NAME) as root:
        yield Image(root, image_settings(NAME), said)


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """/data and /runs: they belong to the image's user, as volumes do by fsGroup."""
    folders = {place: tmp_path_factory.mktemp(place[1:]) for place in ("/data", "/runs")}
    for folder in folders.values():
        shutil.chown(folder, USER, USER)
        folder.chmod(0o755)
    return folders


Start = Callable[..., Container]


@pytest.fixture
def start(image: Image, places: dict[str, Path], tmp_path: Path) -> Start:
    """`start(*arguments, entrypoint=…, writable=…, **environment)`: a container of the image."""

    def begin(
        *arguments: str,
        entrypoint: Sequence[str] | None = None,
        writable: Sequence[str] = ("/runs",),
        **environment: str,
    ) -> Container:
        return Container(
            image.root,
            image.settings,
            tmp_path,
            arguments,
            mounts=places,
            writable=writable,
            environment=environment,
            entrypoint=entrypoint,
        )

    return begin


TRAIN = ["--config=configs/demo.yaml", "--set=data.path=/data/set", "--set=train.output=/runs/demo"]
SMALL = [
    "--set=train.log_steps=1",
    "--set=train.epochs=200",
    "--set=optim.warmup_epochs=0",
    "--set=train.batch_size=32",
]


@pytest.fixture(scope="session")
def packed(image: Image, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A set of drawn faces in /data, packed in a container as well."""
    command = [
        *("pack", "synthetic", "--out=/data/set", "--workers=1", "--seed=0", "--identities=64"),
        *("--images-per-identity=8", "--verification-identities=12", "--pairs=400"),
    ]
    folder = tmp_path_factory.mktemp("pack")
    with Container(
        *(image.root, image.settings, folder, command),
        mounts=places,
        writable=["/data"],
        entrypoint=["python", "-m", "data"],
    ) as container:
        assert container.ended(300) == 0, container.told


def test_the_build_says_its_size(image: Image) -> None:
    assert re.search(rf"^{NAME}: [\d.]+ [MG]B, built by (docker|buildah|podman)$", image.said, re.MULTILINE)


def test_the_image_holds_what_it_needs_and_nothing_else(image: Image) -> None:
    there = {path.name for path in (image.root / "app").iterdir()}
    assert there >= {"train_dist.py", "configs", "training", "docker", "LICENSE"}
    assert not there & {"tests", "benchmarks", "docs", ".git", ".venv", "runs", "Makefile", "clusterface.egg-info"}
    assert not list((image.root / "app").rglob("__pycache__"))
    assert not (image.root / "etc/pip.conf").exists()
    assert not (image.root / "build").exists()
    settings = image.settings
    assert settings["User"] == "10001:10001"
    assert settings["Entrypoint"] == ["python", "-m", "docker.launch"]
    assert settings["Healthcheck"]["Test"] == ["CMD", "python", "-m", "docker.health"]
    files = list((image.root / "app").rglob("*"))
    assert not [path for path in files if path.owner() != "root"]
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert modes <= {(True, 0o755), (False, 0o644), (False, 0o755)}  # whatever the checkout's are


def test_without_arguments_it_says_what_it_takes(start: Start) -> None:
    with start("-c", "python -m docker.launch --help >&2", entrypoint=["sh"]) as container:
        assert container.ended(60) == 0
    assert "Arguments are those of train_dist.py" in container.told


def test_it_may_write_where_it_should_and_nowhere_else(start: Start) -> None:
    places = ["/app", "/opt", "/data", "/runs", "/tmp", "/dev/shm"]
    probe = (
        'id -u >&2; for place; do touch "$place/p" 2>/dev/null && rm "$place/p" && echo "may $place" >&2; done; true'
    )
    with start("-c", probe, "sh", *places, entrypoint=["sh"]) as container:
        assert container.ended(60) == 0
    assert container.told.splitlines() == ["10001", "may /runs", "may /tmp", "may /dev/shm"]


@pytest.mark.usefixtures("packed")
def test_a_stopped_training_saves_and_goes_on(start: Start, places: dict[str, Path]) -> None:
    latest = places["/runs"] / "demo/checkpoints/latest"
    with start(*TRAIN, *SMALL, PET_NPROC_PER_NODE="2") as container:
        container.until("step 2/", 240)
        healthy = container.run("python", "-m", "docker.health")
        assert healthy.returncode == 0, healthy.stderr
        assert "/runs/demo/metrics.jsonl: last told " in healthy.stdout
        silent = container.run("python", "-m", "docker.health", environment=["CLUSTERFACE_SILENCE_S=-1"])
        assert silent.returncode == 1
        container.kill("TERM")
        assert container.ended(120) == 75, container.told
    step = int(latest.read_text(encoding="utf-8").strip().removeprefix("step_"))
    assert latest.stat().st_uid == USER
    with start(*TRAIN, *SMALL, f"--set=train.stop_after_steps={step + 2}", PET_NPROC_PER_NODE="2") as container:
        assert container.ended(240) == 0, container.told
    assert f"resumed at step {step}" in container.told
    assert latest.read_text(encoding="utf-8").strip() == f"step_{step + 2:09d}"


def test_settings_that_cannot_be_end_it_with_2(start: Start) -> None:
    with start("--config=configs/demo.yaml", "--set=data.path=/nowhere", "--set=train.output=/runs/none") as container:
        assert container.ended(120) == 2, container.told
    assert "error: " in container.told


def test_tensorboard_and_the_doctor_are_in_it(start: Start) -> None:
    with start("--version", entrypoint=["tensorboard"]) as container:
        assert container.ended(120) == 0, container.told
    with start("--help", entrypoint=["python", "-m", "training", "doctor"]) as container:
        assert container.ended(120) == 0, container.told
