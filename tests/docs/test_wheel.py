"""What `make wheel` builds is whole: it is installed outside of the tree, imported, and its commands run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT


@pytest.mark.skipif("CLUSTERFACE_TEST_DOCS" not in os.environ, reason="`make test-docs` runs it: ten seconds of a core")
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "scripts" / "release.sh"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "of them recipes, are in the wheel" in lines[0]
    assert [Path(line).suffix for line in lines[1:]] == [".gz", ".whl"]
    assert all(Path(line).is_file() for line in lines[1:])


@pytest.mark.skipif("CLUSTERFACE_TEST_DOCS" not in os.environ, reason="`make test-docs` runs it")
def test_a_wheel_without_recipes_is_refused(tmp_path: Path) -> None:
    """The script can fail: of a tree whose setup.py forgets them."""
    tree = tmp_path / "tree"
    tree.mkdir()
    names = ["configs", "data", "backbones", "partial_fc", "clustering", "training", "evaluation", "scripts", "LICENSE",
             "pyproject.toml", "README.md", "CHANGELOG.md", "MANIFEST.in", "constraints.txt", "sharding.py",
             "train_dist.py"]  # fmt: skip
    for name in names:
        (tree / name).symlink_to(ROOT / name)
    (tree / "scripts").unlink()
    (tree / "scripts").mkdir()
    (tree / "scripts" / "release.sh").write_text((ROOT / "scripts" / "release.sh").read_text(encoding="utf-8"))
    text = (ROOT / "setup.py").read_text(encoding="utf-8").replace('package_data={"configs": ["*.yaml"]},', "")
    (tree / "setup.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["sh", "scripts/release.sh", str(tmp_path / "out")],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHON": str(ROOT / ".venv" / "bin" / "python")},
    )
    assert done.returncode != 0
    assert "demo.yaml" in done.stderr
