"""Runs under torchrun that tests disturb: what they print and when, their ranks, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

_MARK = "CLUSTERFACE_TEST_LAUNCH"


class Launch:
    """A run that is going on; a context manager, which kills whatever is left of it.

    command: behind "python". prefix: before it, such as `ip netns exec NAME`. Every process of it, whatever its
    session, is found by a mark in its environment.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *command],
            cwd=cwd,
            env={**environment, _MARK: self._mark},
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self._reader.join(10)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def told(self) -> str:
        """All that it has printed so far."""
        return "\n".join(line for _, line in self.lines)

    def until(self, text: str, within: float) -> float:
        """Wait for a line that holds `text`; the time at which it came."""
        self._wait(lambda: text in self.told, within, text)
        return next(moment for moment, line in self.lines if text in line)

    def gone(self, within: float) -> None:
        """Wait until none of its processes is left."""
        self._wait(lambda: not self.alive(), within, "the end of all its processes")

    def ranks_gone(self, within: float) -> None:
        """Wait until none of its ranks is left; the launcher may be."""
        self._wait(lambda: not self.ranks(), within, "the end of its ranks")

    def _wait(self, done: Callable[[], bool], within: float, what: str) -> None:
        deadline = time.monotonic() + within
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {within} s for {what}; processes {self.alive()}; it said:\n{self.told}")
            time.sleep(0.05)

    def alive(self) -> list[int]:
        """Its processes."""
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self._is_mine(folder)]

    def ranks(self) -> dict[int, int]:
        """The process of each rank that has begun here."""
        found = {}
        for pid in self.alive():
            for entry in _environment(Path(f"/proc/{pid}")):
                if entry.startswith("RANK="):
                    found[int(entry.removeprefix("RANK="))] = pid
        return found

    def _is_mine(self, folder: Path) -> bool:
        try:
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return False
        return not zombie and f"{_MARK}={self._mark}" in _environment(folder)


def _environment(process: Path) -> list[str]:
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
