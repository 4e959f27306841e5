"""A rank under the entrypoint leaves its exit code, however it ends: beside a stand-in for train_dist.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_A_THREAD = """import os, threading, time
threading.Thread(target=os._exit, args=(76,)).start()
time.sleep(60)
"""
AFTER_A_FORK = """import os, sys
child = os.fork()
if child == 0:
    os._exit(3)
os.waitpid(child, 0)
assert not os.listdir(os.environ["CLUSTERFACE_EXIT_CODES"])
sys.exit(75)
"""
ITS_WORLD = """import sys
import placement_of_the_project
assert sys.argv[1:] == ["--config", "a b.yaml"]
assert not any(path.endswith("docker") for path in sys.path)
sys.exit(int(__name__ != "__main__"))
"""


@pytest.mark.parametrize(
    ("text", "returncode", "left"),
    [
        ("import sys; sys.exit(2)", 2, "2"),
        ("import sys; sys.exit(0)", 0, "0"),
        (IN_A_THREAD, 76, "76"),  # a rank that has lost others
        (AFTER_A_FORK, 75, "75"),
        (ITS_WORLD, 0, "0"),
        ("import sys; sys.exit('why')", 1, "1"),
        ("raise KeyError('bug')", 1, "1"),  # else a peer's 76, which follows from it, would count
        ("raise KeyboardInterrupt", -2, None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, None),
    ],
)
def test_a_rank_leaves_its_exit_code(tmp_path: Path, text: str, returncode: int, left: str | None) -> None:
    (tmp_path / "train_dist.py").write_text(text, encoding="utf-8")
    (tmp_path / "placement_of_the_project.py").touch()
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker/rank.py", tmp_path / "docker")
    codes = tmp_path / "codes"
    codes.mkdir()
    (codes / "1").write_text("99", encoding="utf-8")  # of an earlier start
    done = subprocess.run(
        [sys.executable, "docker/rank.py", "--config", "a b.yaml"],
        cwd=tmp_path,
        env={**os.environ, "CLUSTERFACE_EXIT_CODES": str(codes), "LOCAL_RANK": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == returncode, done.stderr
    assert ((codes / "1").read_text(encoding="utf-8") if (codes / "1").exists() else None) == left
