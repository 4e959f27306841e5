"""A journal of files that grow: how much of each is known to be whole, so that a stopped job can go on there.

A line for each step, `<crc32 of the lines so far> <JSON>`; the first one says of which job. A step names files with
their bytes so far, and the CRC-32 of what they gained since the step before. On resuming, the files are read and
compared: what was cut, garbled or never reached the disk is known, and the last step before it counts.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 20


@dataclass(slots=True)
class State:
    """done: items that are finished; sizes: bytes of each file; left_out: which items; finished: nothing is missing."""

    done: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    finished: bool = False


class Journal:
    """The journal in an open file, `r+b`, and the state that it has come to."""

    def __init__(self, file: BinaryIO, place: Callable[[str], Path]) -> None:
        """place: the path of a file by its name."""
        self._file = file
        self._place = place
        self._crc = 0
        self.stamp = ""
        self.state = State()

    def resume(self) -> None:
        """Read the steps whose files are as they were then, and cut off what comes behind them."""
        self._file.seek(0)
        end, crc = 0, 0
        for number, line in enumerate(self._file):
            crc = zlib.crc32(line[9:], crc)
            try:
                if line[-1:] != b"\n" or line[:9] != b"%08x " % crc:
                    break
                content = json.loads(line[9:])
                if number == 0:
                    self.stamp = str(content["stamp"])
                elif not self._take(content):
                    break
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
            end, self._crc = end + len(line), crc
        self._file.seek(end)
        self._file.truncate()

    def begin(self, stamp: str) -> None:
        """Start anew: forget all steps."""
        self._file.seek(0)
        self._file.truncate()
        self._crc, self.stamp, self.state = 0, stamp, State()
        self._write({"stamp": stamp})

    def add(self, done: int, sizes: Mapping[str, int], left_out: list[int], *, finished: bool = False) -> None:
        """A step, once the files are on disk. left_out: of the items since the step before."""
        before = self.state.sizes
        sums = {
            name: [size, sum_of(self._place(name), before.get(name, 0), size)]
            for name, size in sizes.items()
            if finished or size != before.get(name, 0)
        }
        self._write({"done": done, "files": sums, "left_out": left_out, "finished": finished})
        self.state = State(done, {**before, **sizes}, [*self.state.left_out, *left_out], finished)

    def _take(self, content: dict[str, Any]) -> bool:
        """Go on to a step; False where its files are not as it says."""
        sizes = self.state.sizes.copy()
        for name, (size, crc) in content["files"].items():
            if sum_of(self._place(name), sizes.get(name, 0), size) != crc:
                return False
            sizes[name] = size
        left_out = [*self.state.left_out, *content["left_out"]]
        self.state = State(content["done"], sizes, left_out, content["finished"])
        return True

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content).encode() + b"\n"
        self._crc = zlib.crc32(line, self._crc)
        self._file.write(b"%08x " % self._crc + line)
        self._file.flush()
        os.fsync(self._file.fileno())


def sum_of(path: Path, begin: int, end: int) -> int:
    """CRC-32 of some bytes of a file, -1 where it does not have them."""
    crc = 0
    try:
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                block = file.read(min(_BLOCK, end - begin))
                if not block:
                    return -1
                crc, begin = zlib.crc32(block, crc), begin + len(block)
    except OSError:
        return -1
    return crc
