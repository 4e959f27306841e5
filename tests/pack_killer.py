"""Runs `python -m data pack` in forks that are killed at one place after the other, and then goes on; for tests.

Arguments: a folder, how many places to go on at a time, and those of `pack`; `{}` among them is the folder of the set.
Prints how many places there were, and what was not as it should be.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import data.making.partial
import data.making.spill
from data.__main__ import main
from data.making.pack import SetWriter


def _killing(function: Any, left: list[int]) -> Any:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return wrapped


def _run(arguments: list[str], place: int) -> int:
    """Exit status of a fork that is killed at that place, 0: nowhere."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        left = [place]
        os.fsync = _killing(os.fsync, left)
        for owner, name in ((SetWriter, "write"), (Path, "replace"), (Path, "unlink"), (os, "truncate")):
            setattr(owner, name, _killing(getattr(owner, name), left))
        os._exit(main(["pack", *arguments]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _main(folder: Path, stride: int, arguments: list[str]) -> None:
    data.making.partial.STEP = data.making.spill.STEP = 7
    importlib.import_module("pyarrow.parquet")  # once, not in each fork

    def of_set(name: str) -> list[str]:
        return [argument.replace("{}", str(folder / name)) for argument in arguments]

    assert _run(of_set("whole"), 0) == 0
    whole, place, status = _files(folder / "whole"), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        place += stride
        name = f"killed-{place}"
        status = _run(of_set(name), place)
        again = _run(of_set(name), 0) if status else 0
        if again or _files(folder / name) != whole:
            print(f"place {place}: {status}, then {again}: {sorted(os.listdir(folder / name))}")
    print(f"{place} places")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
