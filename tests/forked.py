"""Programs of this project in processes that are forks of one which has imported what they import: spares each of
them some seconds. A process so begun is one of its own in all else: arguments, environment, folder, output, exit code.

Ranks are begun as a launcher would, by their environment, but no launcher stands over them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_GRACE_S = 30
"""For ranks when another has failed."""
Done = subprocess.CompletedProcess[str]


class Started:
    """A program that runs."""

    def __init__(self, forks: Forks, command: Sequence[str], pids: Sequence[int], folder: Path) -> None:
        self.pids: Sequence[int] = pids
        self._forks, self._command, self._folder = forks, command, folder
        self._done: Done | None = None

    def printed(self, name: str) -> str:
        """So far, by all ranks, rank 0's first. name: out or err."""
        paths = (self._folder / f"{name}{rank}" for rank in range(len(self.pids)))
        return "".join(path.read_text(encoding="utf-8") for path in paths if path.exists())

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        stats = (Path(f"/proc/{pid}/stat").read_text() for pid in self.pids)
        return all(stat.rpartition(")")[2].split()[0] != "Z" for stat in stats)

    def wait(self, timeout: float) -> Done:
        """What all ranks printed, rank 0's first, and the exit code of the first to fail. Past the time limit none is
        left, and TimeoutExpired is raised.
        """
        if self._done is None:
            code = self._forks.ask({"wait": list(self.pids), "timeout": timeout})
            out, err = self.printed("out"), self.printed("err")
            if code is None:
                self.pids = ()
                raise subprocess.TimeoutExpired(list(self._command), timeout, out, err)
            self._done = subprocess.CompletedProcess(self._command, code, out, err)
        return self._done


class Forks:
    """Begins programs; `close` ends the process of which they are forks."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def ask(self, what: dict[str, Any]) -> Any:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", "from tests.forked import serve; serve()"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        if not (line := self._server.stdout.readline()):
            code, self._server = self._server.wait(20), None
            raise RuntimeError(f"the process that forks has ended: exit code {code}")
        return json.loads(line)

    @contextlib.contextmanager
    def start(self, *command: str, cwd: Path, env: Mapping[str, str], ranks: int = 1) -> Iterator[Started]:
        """`python <command>` on so many ranks. None is left at the end."""
        with tempfile.TemporaryDirectory(prefix="forked-") as folder:
            job = {"command": command, "cwd": str(cwd), "env": dict(env), "ranks": ranks, "folder": folder}
            started = Started(self, command, self.ask(job), Path(folder))
            try:
                yield started
            finally:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(0)

    def run(self, *command: str, cwd: Path, env: Mapping[str, str], ranks: int = 1, timeout: float = 240) -> Done:
        """The same, to its end."""
        with self.start(*command, cwd=cwd, env=env, ranks=ranks) as started:
            return started.wait(timeout)

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait(20)


def serve() -> None:
    """Fork what standard input asks for, a JSON line each, and answer in a line: process ids, or an exit code."""
    import training.demo
    import training.trainer  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lack the other threads"
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _code(asked["wait"], asked["timeout"]) if "wait" in asked else _fork(asked)
        print(json.dumps(answer), flush=True)


def _fork(job: dict[str, Any]) -> list[int]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(found.getsockname()[1])}
    count = str(job["ranks"])
    pids = []
    for rank in range(job["ranks"]):
        if not (pid := os.fork()):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            _become({**job, "env": {**job["env"], **(place | own if job["ranks"] > 1 else {})}}, rank)
        pids.append(pid)
    return pids


def _become(job: dict[str, Any], rank: int) -> None:
    """What a new Python does with its arguments, from start to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a test run that is killed leaves nobody behind
    os.environ.clear()
    os.environ.update(job["env"])
    if "fsspec" in sys.modules:  # it reads the environment when it is imported
        sys.modules["fsspec"].config.set_conf_env(sys.modules["fsspec"].config.conf)
    os.chdir(job["cwd"])
    for number, name in enumerate(("in", "out", "err")):
        path = Path(os.devnull) if name == "in" else Path(job["folder"]) / f"{name}{rank}"
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    code = 0
    try:
        first, *rest = job["command"]
        if first == "-m":
            sys.argv, sys.path[0] = rest, job["cwd"]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code(pids: Sequence[int], timeout: float) -> int | None:
    """Exit code of the first to fail, as a shell has it, or 0; None past the time limit. No process is left."""
    left, code = set(pids), 0
    deadline = time.monotonic() + timeout
    while left:
        for pid in sorted(left):
            if not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                continue
            left.remove(pid)
            status = os.waitstatus_to_exitcode(ended[1])
            if status and not code:
                code = status if status > 0 else 128 - status
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if left and time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None if left and not code else code
