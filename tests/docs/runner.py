"""Runs what a page asks a reader to type, in a folder that looks like a checkout, and compares what is printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tests.docs.blocks import ROOT
from tests.forked import Forks
from tests.integration.conftest import environment

_NUMBER = re.compile(r"(?<![A-Za-z_])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_LINES = re.compile(r"[─━┏┳┓┡╇┩│├┼┤└┴┘┃]+")
_SERVING_S = 60


class Place:
    """A folder with what a checkout has for commands: recipes and train_dist.py."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        for name in ("configs", "train_dist.py"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: str) -> str:
        """What it printed. Raises AssertionError when it fails."""
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(command)]
        if words[0] == "tensorboard":
            return self._served(words[1:])
        if words[0] in ("ls",):
            return subprocess.run(words, cwd=self.folder, check=True, capture_output=True, text=True).stdout
        ranks = 1
        if words[0] == "torchrun":
            ranks, words = _launched(words[1:])
        elif words[0] == "python":
            words = words[1:]
        else:
            raise AssertionError(f"expected a command that can be run here, got: {command}")
        done = self.forks.run(*words, cwd=self.folder, env=self._environment(), ranks=ranks)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def python(self, text: str) -> str:
        """What a Python block prints."""
        path = self.folder / "block.py"
        path.write_text(text, encoding="utf-8")
        done = self.forks.run("block.py", cwd=self.folder, env=self._environment())
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def write(self, name: str, text: str) -> None:
        """A file that the page shows."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        return {**environment(), "COLUMNS": "200"}

    def _served(self, words: Sequence[str]) -> str:
        """TensorBoard, which serves until it is stopped: its page, asked for once."""
        assert (self.folder / words[words.index("--logdir") + 1]).is_dir(), "expected a log to be shown"
        command = [sys.executable, "-m", "tensorboard.main", *words, "--host", "127.0.0.1", "--port", "0"]
        with subprocess.Popen(command, cwd=self.folder, stderr=subprocess.PIPE, text=True, env=environment()) as served:
            try:
                assert served.stderr is not None
                address = next(found[0] for line in served.stderr if (found := re.search(r"http://[\w.]+:\d+/", line)))
                with urllib.request.urlopen(address, timeout=_SERVING_S) as answer:
                    page: str = answer.read().decode()
            finally:
                served.terminate()
        assert "<title>TensorBoard</title>" in page
        return ""


def _launched(words: list[str]) -> tuple[int, list[str]]:
    """Ranks, and what torchrun is to run."""
    ranks = 1
    while words and words[0].startswith("--"):
        option = words.pop(0)
        name, _, value = option.partition("=")
        if name == "--nproc_per_node":
            ranks = int(value)
        elif name not in ("--standalone",):
            raise AssertionError(f"expected an option of torchrun that can be run here, got {option}")
    if words[:2] == ["-m", "--"]:
        words = ["-m", *words[2:]]
    return ranks, words


def missing(printed: str, expected: Sequence[str], *, numbers: bool) -> list[str]:
    """Lines of a page that were not printed; `…` stands for any. numbers: they must be the same too."""
    have = {_plain(line, numbers) for line in printed.splitlines()}
    return [line for line in expected if line.strip() not in ("", "…") and _plain(line, numbers) not in have]


def _plain(line: str, numbers: bool) -> str:
    line = " ".join(_LINES.sub(" ", line).split())
    return line if numbers else _NUMBER.sub("#", line)
